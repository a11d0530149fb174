"""Let the graph normalise pixels: a quarter of the bytes go to the device."""

from __future__ import annotations

import onnx_ir as ir

PIXELS, SCALE = "pixel_values", "pixel_scale"
_STEPS = ("Sub", "Div", "Mul")


class NormalisePixelsPass(ir.passes.InPlacePass):
    """Make the input `pixel_values` uint8 grey levels, and add the input `pixel_scale` [3, E] behind the others.

    The nodes are a Cast to float32 and then `runtime.patches.PixelScale`'s steps in its order, each a float32 operation
    of its own: row 0 of the scale is subtracted, row 1 divides, row 2 is multiplied. The scale is an input, because
    images and videos of one checkpoint may be normalised differently. A graph without `pixel_values` stays as it is.

    It comes after the pass that gives values their types: the steps are float32 whatever the graph computes in.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes before everything that reads the pixels."""
        graph = model.graph
        pixels = next((value for value in graph.inputs if value.name == PIXELS), None)
        if pixels is None or pixels.dtype == ir.DataType.UINT8:
            return ir.passes.PassResult(model, False)
        assert pixels.shape is not None and pixels.dtype == ir.DataType.FLOAT, "the runtime gives float32"
        uses = list(pixels.uses())
        pixels.type = ir.TensorType(ir.DataType.UINT8)
        scale = ir.Value(
            name=SCALE, shape=ir.Shape([len(_STEPS), pixels.shape[-1]]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        graph.inputs.append(scale)
        cast = ir.node("Cast", [pixels], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{PIXELS}/levels")
        split = ir.node("Split", [scale], attributes={"axis": 0, "num_outputs": 3}, num_outputs=3, name=f"{SCALE}/rows")
        nodes, value = [cast, split], cast.outputs[0]
        for op_type, row in zip(_STEPS, split.outputs, strict=True):
            nodes.append(ir.node(op_type, [value, row], name=f"{PIXELS}/{op_type.lower()}"))
            value = nodes[-1].outputs[0]
        for node in nodes:
            for index, output in enumerate(node.outputs):
                output.name = f"{node.name}.{index}"
                output.type = ir.TensorType(ir.DataType.FLOAT)
                output.shape = ir.Shape([1, pixels.shape[-1]]) if node is split else pixels.shape
        graph.insert_before(graph[0], nodes)
        for node, index in uses:
            node.replace_input_with(index, value)
        return ir.passes.PassResult(model, True)
