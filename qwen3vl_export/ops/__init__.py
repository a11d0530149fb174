"""The operators that the traced graphs keep whole: three of domain `qwen3vl`, version 1, and ONNX's own RMSNorm.

Each file has the operator's definition in plain torch (`plain`), the torch custom operator that stands for it in a
trace (`OP`, with the fake form that tells shapes), its ONNX form (`translation`), and, where it is ours, a reference in
numpy and a body in standard ONNX operators (opset 24). A target that has a kernel of its own exchanges the body; any
other inlines it.

`registry` finds the files by their names, so a new operator is its file and the call in `qwen3vl_export.modeling`. That
calls the custom operator while `torch.export` runs, the plain form otherwise; of the experts
it calls the parts `choose` and `mix`, between which hooks can look at a router.
"""
