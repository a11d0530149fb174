"""`QwenVLForImageTextToText`: an engine behind the interface that transformers' users and pipelines know."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from engines.output import output_folder
from qwen3vl_export.integrations.optimum.answers import answer_all, answer_into, joined, note_full_context
from qwen3vl_export.integrations.optimum.opening import open_engine
from qwen3vl_export.integrations.optimum.options import read_options
from qwen3vl_export.integrations.optimum.processor_check import check_processor
from qwen3vl_export.integrations.optimum.prompts import read_batch, read_ids, take_tensors
from runtime.errors import UsageError
from runtime.model import Qwen3VLModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class QwenVLForImageTextToText:
    """An opened engine with `generate(**processor(…))`, for code that was written for transformers.

    Tensors in, tensors out; the engine computes without PyTorch. Rows of a batch run side by side in its scheduler, and
    so do calls of several threads. `engine` is the `Qwen3VLModel` itself, which answers messages.

        model = QwenVLForImageTextToText.from_pretrained("Qwen/Qwen3-VL-2B-Instruct", export=True)
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=64)

    Attributes:
        engine: The engine.
        folder: Where it lies.
        config: transformers' configuration of the checkpoint.
        generation_config: The defaults of `generate`; it may be changed.
        device: Where `generate` leaves its tensors, if `input_ids` is none. The engine takes them from any device.
        dtype: That of `pixel_values`.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities = ("image", "video", "text")
    output_modalities = ("text",)
    dtype = torch.float32

    def __init__(self, engine: Qwen3VLModel, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.device = torch.device("cpu")
        _make_known_to_pipelines(type(self).__name__)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        export: bool | None = None,
        target: str | None = None,
        weight_format: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        engine_cache: str | os.PathLike[str] | None = None,
        processor: Any = None,
        **options: Any,
    ) -> QwenVLForImageTextToText:
        """Open an engine, or a checkpoint, of which an engine is built and kept for the next time (`qwen3vl cache`).

        Args:
            model_id: The folder of an engine, or a checkpoint: a folder, an id of the Hub, or one that is
                shipped: demo, demo-moe, demo-long.
            export: False takes engines alone, True checkpoints alone; by default either is taken.
            target: What to build for, as `qwen3vl targets` lists them; chosen for this machine by default.
            weight_format: Choose the target by the format of its weights, such as int4.
            device: Choose the target by its device: cpu or cuda.
            revision: Commit, branch or tag on the Hub.
            cache_dir: Where downloads from the Hub are kept.
            engine_cache: Where engines are kept.
            processor: Compare this processor with the engine (`check_processor`).
            **options: Further options of `ExportRequest` and `Qwen3VLModel.from_engine`, such as `max_context`,
                `max_sequences` or `threads`.

        Raises:
            UsageError: Arguments contradict each other or are not known; the message names the nearest that is.
            Qwen3VLError: The checkpoint cannot be exported, or the engine not be opened.
        """
        engine, folder = open_engine(
            model_id,
            export=export,
            target=target,
            weight_format=weight_format,
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            engine_cache=engine_cache,
            options=options,
        )
        try:
            if processor is not None:
                check_processor(processor, engine)
            return cls(engine, folder)
        except BaseException:
            engine.close(drain=False)
            raise

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r})"

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        **keywords: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Answer the prompts of a processor's tensors; greedy tokens are those of transformers' model.

        A row may be padded at either side, and is answered as if it were alone. What transformers takes and engines do
        not is refused by name. Without `max_new_tokens`, answers have up to 512 tokens. An answer that the engine's
        context has no more room for ends there, and a note is logged.

        Args:
            inputs: `input_ids`, int64 [B, L], if it is not given by name.
            generation_config: Laid over the model's own.
            streamer: Given the prompt and each new token, for one prompt.
            tokenizer: Compared with the engine's, which finds stop strings.
            **keywords: The processor's tensors: `input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`,
                `pixel_values_videos`, `video_grid_thw`, `mm_token_type_ids`; fields of `GenerationConfig`; and options
                that engines have beside: `seed`, `presence_penalty`, `frequency_penalty`, `max_thinking_tokens`,
                `max_repetitions`, `response_format`, `logit_bias`.

        Returns:
            Prompts with their answers behind them, int64 [B · num_return_sequences, L + T], short answers padded with
            `pad_token_id`; as `sequences` of a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

        Raises:
            UsageError: The tensors are not of this checkpoint's processor, or an option is not done.
            CapacityError: A prompt does not fit into the engine's context.
            Qwen3VLError: An answer failed.
        """
        if streamer is None:
            return self._generate(inputs, generation_config, None, tokenizer, keywords)
        if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise UsageError(
                f"a streamer has put and end, {type(streamer).__name__} has not",
                remedy="pass a TextStreamer or a TextIteratorStreamer of transformers",
            )
        try:
            return self._generate(inputs, generation_config, streamer, tokenizer, keywords)
        finally:  # whatever happens, so that no other thread waits for more of it
            streamer.end()

    def _generate(
        self, inputs: Any, generation_config: GenerationConfig | None, streamer: Any, tokenizer: Any, keywords: Any
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        tensors = take_tensors(keywords)
        if inputs is not None:
            if tensors["input_ids"] is not None:
                raise UsageError("inputs and input_ids are both given", remedy="pass input_ids alone")
            tensors["input_ids"] = inputs
        if tokenizer is not None:
            check_processor(tokenizer, self.engine)
        asked = read_options(self.generation_config, generation_config, keywords, read_ids(tensors).shape[1])
        batch = read_batch(tensors, self.engine.config, self.engine.preparation.inputs, asked.padding)
        prompts = [prompt for prompt in batch.prompts for _ in range(asked.num_return_sequences)]
        options = asked.of_answers(len(prompts))
        if streamer is None:
            answers = answer_all(self.engine, prompts, options)
        elif len(prompts) == 1:
            streamer.put(torch.from_numpy(batch.input_ids))
            answers = [answer_into(streamer, self.engine, prompts[0], options[0])]
        else:
            raise UsageError(
                f"a streamer takes one answer, not {len(prompts)}", remedy="pass one prompt, or no streamer"
            )
        note_full_context(self.engine.max_context, prompts, answers, options[0])
        rows = batch.input_ids.repeat(asked.num_return_sequences, axis=0)
        device = getattr(tensors["input_ids"], "device", self.device)
        sequences = torch.from_numpy(joined(rows, answers, asked.pad_token_id)).to(device)
        return GenerateDecoderOnlyOutput(sequences=sequences) if asked.returns_dict else sequences

    def check_processor(self, processor: Any) -> None:
        """Raise if a processor, or a tokenizer, is not of the engine's checkpoint.

        Raises:
            UsageError: It says what differs.
        """
        check_processor(processor, self.engine)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Copy the engine into a folder, from which `from_pretrained` opens it.

        Raises:
            UsageError: The folder is not a place for an engine.
            CapacityError: The disk is too small.
        """
        files = [path for path in self.folder.iterdir() if path.is_file()]
        sizes = [path.stat().st_size for path in files]
        with output_folder(Path(save_directory), sum(sizes), max(sizes)) as folder:
            for path in files:
                shutil.copyfile(path, folder / path.name)

    def can_generate(self) -> bool:
        """Return True: pipelines ask."""
        return True

    def to(self, device: Any) -> QwenVLForImageTextToText:
        """Note where `generate` is to leave its tensors; the engine stays on the device that it was built for."""
        self.device = torch.device(device)
        return self

    def eval(self) -> QwenVLForImageTextToText:
        """Return the model: there is nothing to switch off."""
        return self

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def __enter__(self) -> QwenVLForImageTextToText:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close(drain=False)


def _make_known_to_pipelines(name: str) -> None:
    """Put a class beside those that the pipeline expects, which otherwise logs an error about it and goes on.

    `AutoModelForImageTextToText.register` does that for a configuration of one's own; this one has transformers'.
    """
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("qwen3vl_engine", name)
