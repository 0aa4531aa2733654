"""Encodes prompts with LLaMA and CLIP, in a process of its own.

    python text_worker.py FOLDER

It reads `request.json` in the folder, and writes `answer.safetensors` and then
`answer.json`; `models.hunyuan.text_process` is the other side. It imports nothing of
this project, so JAX does not start here, and all memory is free when it ends. Its
syntax is that of Python 3.10.

Weights are read from safetensors files on this machine: no network, no pickles, and no
code that lies beside a checkpoint.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path

# Bytes beside the weights: the CUDA context, activations of 351 tokens.
MARGIN = 2 * 2**30
CLIP_TOKENS = 77


class WorkerError(Exception):
    """An error with a message for people; its kind is one of `text_process`."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


def main(folder):
    """Answers the request in a folder."""
    end_with_parent()
    answer, arrays = {}, {}
    try:
        answer, arrays = encode(json.loads((folder / "request.json").read_text()))
    except BaseException as error:
        answer = {"error": describe(error)}
    if arrays:
        from safetensors.numpy import save_file

        save_file(arrays, folder / "answer.safetensors")
    partial = folder / "answer.partial"
    partial.write_text(json.dumps(answer))
    partial.replace(folder / "answer.json")  # its presence says that all is written


def end_with_parent():
    """Ends this process when the parent has: it holds the other end of stdin."""

    def wait():
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def describe(error):
    """Returns the kind of an error, its message and its traceback."""
    kind, message = "other", f"{type(error).__name__}: {error}"
    if isinstance(error, WorkerError):
        kind, message = error.kind, str(error)
    elif isinstance(error, ImportError):
        kind, message = "import", str(error)
    elif isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        kind = "memory"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return {"kind": kind, "message": message, "traceback": "".join(lines)}


def encode(request):
    """Returns what was done, and the arrays of every prompt."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Small files first: what is wrong with them shows at once.
    tokens, counts = llama_tokens(transformers, request)
    clip_tokens = tokens_of_clip(transformers, request)
    classes = model_classes(torch, transformers)
    configs = read_configs(transformers, request)
    check_ids(configs, {"text_encoder": tokens, "text_encoder_2": clip_tokens})
    device, dtype = choose_device(
        torch, request["device"], count_weights(torch, classes, configs)
    )
    place = {"device": device, "dtype": dtype}
    arrays = {}
    with torch.inference_mode():
        for part, ids in (("text_encoder_2", clip_tokens), ("text_encoder", tokens)):
            model = load(classes[part], request[part], configs[part], place)
            for index, row in enumerate(ids):
                output = model(torch.tensor([row], device=device))
                if part == "text_encoder":
                    rows = output.last_hidden_state[0, request["crop"] :]
                    arrays[f"context.{index}"] = rows.float().cpu().numpy()
                else:
                    pooled = output.pooler_output[0]
                    arrays[f"pooled.{index}"] = pooled.float().cpu().numpy()
            del model
    names = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    return {"num_tokens": counts, **names}, arrays


def llama_tokens(transformers, request):
    """Returns the ids of each text, cut, and how many there were after the crop."""
    folder, crop = request["tokenizer"], request["crop"]
    # This class takes tokenizer.json as it is; others rebuild some of its rules.
    tokenizer = read(transformers.PreTrainedTokenizerFast, folder)
    found = len(tokenizer(request["prefix"]).input_ids)
    if found != crop:
        raise WorkerError(
            "checkpoint",
            f"the tokenizer in {folder} makes {found} tokens of the template before "
            f"the prompt; expected {crop}: it is not that of LLaVA-LLaMA-3",
        )
    most = crop + request["kept"]
    counts = [len(tokenizer(text).input_ids) - crop for text in request["texts"]]
    rows = [
        tokenizer(text, truncation=True, max_length=most).input_ids
        for text in request["texts"]
    ]
    # Padding would stand behind, where causal attention never looks: it is left out.
    return rows, counts


def tokens_of_clip(transformers, request):
    """Returns the ids of each bare prompt; a long one keeps its end token."""
    tokenizer = read(transformers.CLIPTokenizer, request["tokenizer_2"])
    return [
        tokenizer(prompt, truncation=True, max_length=CLIP_TOKENS).input_ids
        for prompt in request["prompts"]
    ]


def model_classes(torch, transformers):
    """Returns the classes of both models, by part."""

    class Llama(transformers.LlamaModel):  # type: ignore[name-defined]
        """LLaMA without its final norm, which is then neither loaded nor run."""

        def __init__(self, config):
            super().__init__(config)
            self.norm = torch.nn.Identity()

    return {"text_encoder": Llama, "text_encoder_2": transformers.CLIPTextModel}


def read_configs(transformers, request):
    """Returns the configurations of both models, LLaMA's without its last layers."""
    llama = read(transformers.LlamaConfig, request["text_encoder"])
    llama.num_hidden_layers -= request["skipped_layers"]
    clip = read(transformers.CLIPTextConfig, request["text_encoder_2"])
    return {"text_encoder": llama, "text_encoder_2": clip}


def check_ids(configs, ids):
    """Raises if a tokenizer has tokens that its model lacks."""
    for part, rows in ids.items():
        size, largest = configs[part].vocab_size, max(map(max, rows))
        if largest >= size:
            raise WorkerError(
                "checkpoint",
                f"the tokenizer of {part} gives the token {largest}; the model has "
                f"vectors for {size}",
            )


def count_weights(torch, classes, configs):
    """Returns the numbers in the weights of the larger model; no memory is taken."""
    with torch.device("meta"):
        models = [classes[part](config) for part, config in configs.items()]
    return max(sum(p.numel() for p in model.parameters()) for model in models)


def choose_device(torch, wanted, count):
    """Returns the device, and the dtype in which the weights fit there.

    On a GPU this is float16, as published. A CPU computes in float32 if its memory
    holds the weights so, else in bfloat16.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        needed, (free, _) = 2 * count + MARGIN, torch.cuda.mem_get_info()
        if needed <= free:
            return "cuda", torch.float16
        if wanted == "cuda":
            raise WorkerError("memory", lacking("the GPU", needed, free))
    elif wanted == "cuda":
        raise WorkerError(
            "device", "device='cuda' is asked for, but torch finds no GPU"
        )
    free = free_memory()
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        needed = size * count + MARGIN
        if needed <= free:
            return "cpu", dtype
    raise WorkerError("memory", lacking("the CPU", needed, free))


def lacking(where, needed, free):
    """Says that the weights find no memory."""
    return (
        f"the text encoder needs {needed / 1e9:.1f} GB of memory on {where}, of which "
        f"{free / 1e9:.1f} GB are free; free some, or give embeddings that another "
        "machine has made"
    )


def free_memory():
    """Returns the bytes that this process may still take, on Linux."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    free = 1024 * int(fields["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")  # of a container, which may be given less
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
        return min(free, limit - int(used["anon"]))
    except (OSError, ValueError, KeyError):  # there is no such limit
        return free


def load(cls, folder, config, place):
    """Returns a model on its device.

    Raises:
      WorkerError: A weight is missing or has another shape; transformers would draw it.
    """
    model, info = read(
        cls,
        folder,
        config=config,
        dtype=place["dtype"],
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise WorkerError(
            "checkpoint",
            f"{folder} does not fit: missing or of another shape are "
            f"{', '.join(map(str, wrong[:5]))} and {max(0, len(wrong) - 5)} more",
        )
    return model.eval().to(place["device"])


def read(cls, folder, **options):
    """Reads a part from a folder with `from_pretrained`, which says little of where."""
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise WorkerError(
            "checkpoint", f"{folder} cannot be read: {type(error).__name__}: {error}"
        ) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
