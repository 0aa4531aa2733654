"""Keys of adapters: the module that a tensor belongs to, and its role there.

Tools spell the same in many ways. They put a prefix before the module's name, write its
dots as underscores, and put the adapter's own name among the last parts of the key.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from models.checkpoints.lora.problems import Problem

# Before a module's name, in any order: original code, diffusers, PEFT, kohya's tools
# (musubi-tuner's newer models with two underscores), OneTrainer, LyCORIS, DiffSynth.
_PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "model.",
    "base_model.",
    "module.",
    "dit.",
    "pipe.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "_",
)
_MOST_PREFIXES = 5
# Wrappers of PyTorch, anywhere in a name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Last part of a key, "weight" and "bias" apart. The adapter's own name may follow it.
_NAMED_ROLES = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "core",
    **{
        name: name
        for name in (
            *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
            "lokr_t2",
            *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        )
    },
}
_ROLES = {
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",  # LyCORIS calls the differences of norms so
    "b_norm": "diff_b",
    "dora_scale": "dora_scale",
}
# Adapters of other methods, by the last part of their keys.
_OTHER_METHODS = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_r": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "lokr_t1": "LoKr with lokr_t1",
    "a1": "GLoRA",
    "a2": "GLoRA",
    "b1": "GLoRA",
    "b2": "GLoRA",
    "set_weight": "whole weights",
    "reshape_weight": "weights of another shape",
}


class Part(NamedTuple):
    """One tensor of an adapter."""

    key: str
    module: str  # as the key spells it, without a prefix
    value: Any


type Parts = Mapping[str, Part]  # of one module of the model, by role


class _Key(NamedTuple):
    """A key in its three pieces."""

    module: str
    role: str
    adapter: str  # the adapter's own name; mostly there is none


def sort_by_module[Name](
    tensors: Mapping[str, Any], names: Mapping[str, Name], features: Mapping[str, str]
) -> tuple[dict[Name, dict[str, Part]], list[Problem]]:
    """Sorts an adapter's tensors by module of the model and role.

    Args:
      tensors: The adapter's tensors by key.
      names: The model's modules by every spelling.
      features: What parts of names mean that this model lacks; see `merge_lora`.

    Returns:
      The tensors by the model's name and role; and the keys that have none.
    """
    features = {
        part: feature
        for part, feature in features.items()
        if not any(part in name for name in names)
    }
    modules: dict[Name, dict[str, Part]] = {}
    adapters: dict[str, str] = {}  # the first key of each name
    problems = []
    for key, value in tensors.items():
        parsed = _parse(key)
        if parsed is None:
            problems.append(_unknown(key))
            continue
        module = _find(parsed.module, names) or _find(
            parsed.module.replace(".", "_"), names
        )
        if module is None:
            problems.append(_unmatched(key, parsed.module, features))
            continue
        adapters.setdefault(parsed.adapter, key)
        parts = modules.setdefault(names[module], {})
        if parsed.role in parts:
            both = f"{parts[parsed.role].key} and {key}"
            problems.append(Problem("twice", f"{both} mean the same"))
        parts.setdefault(parsed.role, Part(key, module, value))
    if len(named := [name for name in adapters if name]) > 1:
        first, second = (adapters[name] for name in named[:2])
        text = f"{first} and {second} are of two; expected one in a file"
        problems.append(Problem("several adapters", text))
    return modules, problems


def _parse(key: str) -> _Key | None:
    """Splits a key; None if its ending is unknown."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    parts = key.split(".")
    if parts[-1] == "diff_m":  # a table that belongs to the block: names spell it so
        return _Key(key, "diff", "")
    if len(parts) > 1 and parts[-1] in _ROLES:
        return _Key(".".join(parts[:-1]), _ROLES[parts[-1]], "")
    kind = parts.pop() if parts[-1] in ("weight", "bias") else "weight"
    for rest, adapter in ((parts, ""), (parts[:-1], parts[-1] if parts else "")):
        *module, last = rest or [""]
        if module and module[-1] == "lora" and last in ("down", "up"):
            module, last = module[:-1], f"lora_{last}"  # diffusers, before PEFT
        elif module and module[-1].endswith("_lora") and last in ("down", "up"):
            module[-1], last = module[-1].removesuffix("_lora"), f"lora_{last}"
        if module and last in _NAMED_ROLES:
            role = _NAMED_ROLES[last]
            if kind == "bias" and role != "up":
                return None
            return _Key(
                ".".join(module), "up_bias" if kind == "bias" else role, adapter
            )
    return None


def _find(spelled: str, names: Mapping[str, Any]) -> str | None:
    """Returns a module's name without its prefixes, if the model knows it."""
    return next((bare for bare in _bare_names(spelled) if bare in names), None)


def _bare_names(spelled: str) -> Iterator[str]:
    """Returns a module's name without its prefixes, one after the other."""
    pending = [spelled]
    for _ in range(_MOST_PREFIXES):
        yield from pending
        pending = [
            name.removeprefix(prefix)
            for name in pending
            for prefix in _PREFIXES
            if name.startswith(prefix)
        ]
    yield from pending


def _unknown(key: str) -> Problem:
    parts = key.split(".")
    last = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if last in _OTHER_METHODS:
        text = f"{key} is of a method that is not merged here: {_OTHER_METHODS[last]}"
        return Problem("other method", text, may_skip=True)
    text = f"{key} is of no kind that is known here"
    return Problem("unknown kind", text, may_skip=True)


def _unmatched(key: str, module: str, features: Mapping[str, str]) -> Problem:
    for part, feature in features.items():
        if part in module:
            text = f"{key} is for {feature}, not for this one"
            return Problem("another model", text, may_skip=True)
    text = f"{key} belongs to no weight of the model"
    return Problem("unmatched", text, may_skip=True)
