"""The door of banks, models and streams: every argument is checked here, once, before anything is opened or written."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.encoder.stamp import EncoderStamp
from longmem.errors import WrongArgumentsError, name_known
from longmem.memory.rows.documents import Document, SourcePart
from longmem.memory.rows.storage import LARGEST_NUMBER, STORAGE_DTYPES, LayerShape, largest_number

FIRST_DATE, LAST_DATE = -62_135_596_800, 253_402_300_799  # those that a calendar shows
SEARCHES = ("chunk_mean", "token")
LARGEST_TOKEN_ID = 2**31 - 1  # a bank on disk keeps ids in four bytes
MOST = 2**48  # tokens or bytes; no machine has so many, so whoever says more means no limit
Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_CHUNKS = 2**24  # of one search; its result is as large, for each query


def checked(function: Function) -> Function:
    """Return `function` with each argument checked by the rule of its name (`RULES`), before anything is done.

    None is let through where it is the default. Raises ValueError; WrongArgumentsError, which is one and a TypeError, for a
    name that the function does not take, or an argument that is missing.
    """
    signature = inspect.signature(function)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())

    @functools.wraps(function)
    def wrapper(*given: Any, **named: Any) -> Any:
        for name in named:
            if name not in signature.parameters and not takes_any:
                known = [each for each in signature.parameters if each not in ("self", "cls")]
                raise WrongArgumentsError(
                    f"`{function.__qualname__}` must be given arguments that it has, got `{name}`; "
                    f"{name_known(name, known, 20)}"
                )
        try:
            arguments = signature.bind(*given, **named).arguments
        except TypeError as error:
            raise WrongArgumentsError(
                f"`{function.__qualname__}` got too few or too many arguments: {error}."
            ) from None
        for name, value in arguments.items():
            rule = RULES.get(name)
            if rule is not None and not (value is None and signature.parameters[name].default is None):
                rule(name, value)
        return function(*given, **named)

    return wrapper  # type: ignore[return-value]


def checked_methods(*unchecked: str) -> Callable[[Class], Class]:
    """Return a decorator of classes that checks the constructor and each public method that takes arguments (`checked`).

    `unchecked`: methods that a forward pass calls, for which a look at every argument is too much.
    """

    def put(owner: Class) -> Class:
        for name, method in list(vars(owner).items()):
            is_class_method = isinstance(method, classmethod)
            function = method.__func__ if is_class_method else method
            is_public = name == "__init__" or not name.startswith("_")
            if not is_public or name in unchecked or not inspect.isfunction(function):
                continue
            if len(inspect.signature(function).parameters) > 1:
                wrapped = checked(function)
                setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)
        return owner

    return put


def got(value: object) -> str:
    r"""Return how an error message shows a value: in one line, and a long one by its beginning.

    >>> got("a\nb"), got(range(3)), len(got("a" * 1000))
    ("'a\\nb'", 'range(0, 3)', 80)
    """
    shown = repr(value)
    shown = " ".join(shown.split()) if "\n" in shown else shown
    return shown if len(shown) <= 80 else shown[:77] + "..."


def rule(must: str, fits: Callable[[Any], bool], way_out: str) -> Callable[[str, object], None]:
    """Return a function of an argument's name and its value; it raises ValueError, which says all three, unless that `fits`."""

    def validate(argument: str, value: object) -> None:
        if not fits(value):
            raise ValueError(f"`{argument}` must be {must}, got {got(value)}; {way_out}.")

    return validate


def is_integer(value: object, least: int, most: int) -> bool:
    """Return whether `value` is an integer, and not True or False, in the range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def validate_integer(argument: str, value: object, least: int = -(2**63), most: int = 2**63 - 1) -> None:
    """Raise ValueError unless `value` is an integer in the range."""
    if not is_integer(value, least, most):
        raise ValueError(
            f"`{argument}` must be an integer from {least} to {most}, got {got(value)}; choose one of these."
        )


def _takes_two_numbers(value: object) -> bool:
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind(0, 1)
    except TypeError:
        return False
    except ValueError:  # what is written in C says nothing
        pass
    return True


def _is_path(value: object) -> bool:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    return isinstance(path, str) and bool(path.strip()) and "\0" not in path


def _is_name(value: object) -> bool:
    """Return whether `value` may name a model, or be one: it is no number, no blank and no container."""
    wrong = value is None or isinstance(value, int | float | bytes | list | tuple | dict)
    return not wrong and not (isinstance(value, str) and not value.strip())


def is_word(value: object) -> bool:
    """Return whether the value is text that is not empty, without halves of surrogate pairs, which nothing can write."""
    if not isinstance(value, str) or not value:
        return False
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _has(*names: str) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


validate_flag = rule("True or False", lambda value: isinstance(value, bool), "words and numbers are not taken for them")
validate_callable = rule("a function of (tokens done, tokens in all)", _takes_two_numbers, "or leave it out")
validate_mapping = rule(
    "a dictionary of named options",
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
    "leave it out for none",
)
validate_name = rule(
    'a folder, a name on the hub or a packaged one such as "smollm2-135m"', _is_name, 'the current folder is "."'
)
validate_string = rule("a string", lambda value: isinstance(value, str), "leave it out for the default")
validate_folder = rule("the path of a folder", _is_path, 'the current folder is "."')
validate_document_id = rule("a string that is not empty, of whole characters", is_word, "name the document")
validate_model = rule(
    "a LongMem model",
    _has("encoder"),
    "`LongMemForCausalLM.from_pretrained` opens one by name, and `from_backbone` makes one of a causal LM",
)
validate_bank = rule(
    "one MemoryBank, which can be written to",
    _has("add", "append", "transaction"),
    "`MemoryBank.for_model(model)` makes one",
)
validate_segment = rule(
    '"new", None or, where something is appended, "same"',
    lambda value: isinstance(value, str) and value in ("new", "same"),
    "leave it out where it is not known",
)
validate_fingerprint = rule(
    "an EncoderStamp or its digest",
    lambda value: isinstance(value, EncoderStamp) or is_word(value),
    "`model.encoder_stamp()` returns one",
)
validate_part = rule("a SourcePart", lambda value: isinstance(value, SourcePart), "`SourcePart(token_ids)` makes one")
validate_models = rule(
    "a list of LongMem models",
    lambda value: isinstance(value, list | tuple) and all(map(_has("encoder"), value)),
    "put a single one into a list",
)
validate_rows = rule(
    "a tensor of integers, as `search` returns them",
    lambda value: isinstance(value, Tensor) and value.dtype in INTEGERS and not value.is_meta,
    "search again",
)
validate_tensor = rule("a tensor", lambda value: isinstance(value, Tensor), "`torch.tensor([...])` makes one")


def validate_text(argument: str, text: str) -> None:
    """Raise ValueError for text with halves of surrogate pairs, of which no tokenizer makes tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{argument}` must be text that UTF-8 can write, got half of a surrogate pair ({error}); read files "
            'with `encoding="utf-8"`.'
        ) from error


def validate_count(argument: str, value: object, most: int = MOST) -> None:
    """Raise ValueError unless `value` is an integer from one to `most`."""
    if not is_integer(value, 1, most):
        raise ValueError(
            f"`{argument}` must be an integer of at least 1 and at most {most:,}, got {got(value)}; or leave it out."
        )


def validate_device(argument: str, value: object) -> torch.device:
    """Return the device that is meant. Raises ValueError unless this machine has it."""
    problem = "that is no name of a device"
    if isinstance(value, str | torch.device):
        try:
            device = torch.device(value)
            torch.empty(0, device=device)
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            problem = str(error).partition("\n")[0].rstrip(".")
    count = torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator()
    there = ["cpu", *(f"{kind}:{number}" for number in range(count))]
    raise ValueError(
        f"`{argument}` must be a device of this machine, got {got(value)} ({problem}); there are: {', '.join(there)}."
    )


def validate_choice(argument: str, value: object, known: Collection[str]) -> str:
    """Return `value`; raise ValueError unless it is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{argument}` must be one of the known names, got {got(value)}; {name_known(value, known)}")
    return value


def validate_storage_dtype(value: object, known: Mapping[str, torch.dtype] = STORAGE_DTYPES) -> torch.dtype:
    """Return the dtype, one of the `known`, that is meant by a torch dtype or by its name.

    >>> validate_storage_dtype("bfloat16")
    torch.bfloat16
    """
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    return known[validate_choice("storage_dtype", name, known)]


def validate_sizes(
    memory_layers: Sequence[int], chunk_size: int, capacity_tokens: int | None, capacity_bytes: int | None
) -> None:
    """Raise ValueError unless the layers are distinct indices and the capacity, if any, is a whole number of chunks."""
    layers = memory_layers if isinstance(memory_layers, Sequence) else ()
    whole = all(is_integer(layer, 0, 2**31 - 1) for layer in layers)
    if not whole or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            "`memory_layers` must be distinct backbone layer indices, counted from 0, and at least one of them, "
            f"got {got(tuple(layers) or memory_layers)}; for a model, `MemoryBank.for_model(model)` reads them from its config."
        )
    validate_count("chunk_size", chunk_size)
    if capacity_bytes is not None:
        validate_count("capacity_bytes", capacity_bytes)
    if capacity_tokens is None:
        return
    validate_count("capacity_tokens", capacity_tokens)
    if capacity_tokens < chunk_size or capacity_tokens % chunk_size:
        below = capacity_tokens - capacity_tokens % chunk_size
        raise ValueError(
            f"`capacity_tokens` must hold at least one chunk, and be a multiple of `chunk_size`, got {capacity_tokens} and "
            f"{chunk_size}; the nearest below is {below or 'none'}, the nearest above {below + chunk_size}."
        )


def validate_names(argument: str, names: object) -> tuple[str, ...]:
    """Return the names in a list, each once; of a single one, that one, and of None, none."""
    names = (names,) if isinstance(names, str) else () if names is None else names
    if not isinstance(names, Iterable) or not all(map(is_word, names := list(names))):
        raise ValueError(f"`{argument}` must be a name or a list of names, none of them empty, got {got(names)}.")
    return tuple(dict.fromkeys(names))


def validate_known(argument: str, document_id: object, known: Collection[str]) -> None:
    """Raise ValueError unless the bank holds this document."""
    validate_document_id(argument, document_id)
    if document_id not in known:
        raise ValueError(
            f"`{argument}` must name a document of the bank, got {got(document_id)}, which was never added or has been "
            f"deleted or evicted; {name_known(document_id, known)} `add` starts a new document."
        )


def validate_new(argument: str, document_id: object, known: Container[object]) -> None:
    """Raise ValueError if the id is taken."""
    validate_document_id(argument, document_id)
    if document_id in known:
        raise ValueError(
            f"`{argument}` must be new to the bank, got {got(document_id)}, which it holds already; `append` continues a "
            "document, `update` replaces it, `delete` makes room for another of that name."
        )


def validate_key_values(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    memory_layers: Sequence[int],
    known_shapes: Sequence[LayerShape] | None,
    storage_dtype: torch.dtype,
) -> int:
    """Return the number of tokens, after a check of shapes, dtypes and numbers.

    `known_shapes`: what earlier writes have fixed, None before the first.
    """
    for argument, tensors in (("keys", keys), ("values", values)):
        if not isinstance(tensors, Sequence | Tensor) or len(tensors) != len(memory_layers):
            got = f"{len(tensors)} of them" if isinstance(tensors, Sequence | Tensor) else type(tensors).__name__
            raise ValueError(
                f"`{argument}` must be a sequence with one tensor for each memory layer, got {got} for layers "
                f"{tuple(memory_layers)}; pass a list, also for one layer."
            )
        for layer, tensor in zip(memory_layers, tensors, strict=True):
            is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
            if not is_dense or tensor.ndim != 3 or tensor.dtype not in FLOATS:
                got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(
                    f"`{argument}` must be floating-point tensors (kv_heads, tokens, dim), got {got} for layer "
                    f"{layer}; a bank stores one row of a batch at a time."
                )
    num_tokens = keys[0].shape[1]
    if not num_tokens:
        raise ValueError("`keys` must hold at least one token, got zero tokens; leave out empty documents.")
    for position, (layer, key, value) in enumerate(zip(memory_layers, keys, values, strict=True)):
        if key.shape[:2] != value.shape[:2] or key.shape[1] != num_tokens or not key.numel() or not value.numel():
            raise ValueError(
                "`keys` and `values` must agree in heads, and in tokens across all layers, with no size of zero, got "
                f"{tuple(key.shape)} and {tuple(value.shape)} for layer {layer}, with {num_tokens} tokens in layer "
                f"{memory_layers[0]}; pass the keys and values of one forward pass."
            )
        known = None if known_shapes is None else known_shapes[position]
        shape = LayerShape(key.shape[0], key.shape[2], value.shape[2], known is not None and known.by_token)
        if known is not None and shape != known:
            raise ValueError(
                f"`keys` and `values` of layer {layer} must fit what the bank holds, {known}, got "
                f"{shape}; use one bank for each model, or `clear()` this one."
            )
    _validate_numbers(keys, values, memory_layers, storage_dtype)
    return num_tokens


def _validate_numbers(
    keys: Sequence[Tensor], values: Sequence[Tensor], memory_layers: Sequence[int], storage_dtype: torch.dtype
) -> None:
    """Raise ValueError for NaN, inf, and numbers that rounding to the storage dtype would turn into inf."""
    limit = largest_number(storage_dtype)
    for position, tensor in enumerate((*keys, *values)):
        # One pass over the numbers finds NaN too, which `aminmax` lets through.
        number = torch.stack(tensor.detach().aminmax()).abs().amax().item()
        if number <= limit:
            continue
        argument = "keys" if position < len(keys) else "values"
        place = f"`{argument}` of layer {memory_layers[position % len(keys)]}"
        if not math.isfinite(number):
            raise ValueError(
                f"{place} must be finite, got NaN or inf; the backbone overflowed or was fed bad input: try it in "
                "bfloat16 or float32."
            )
        way_out = 'create the bank with `storage_dtype="bfloat16"`, "float32" or "int8"'
        raise ValueError(
            f"{place} must fit the storage dtype {storage_dtype} (largest {limit:.6g}), got {number:.6g}; "
            f"{way_out if limit < LARGEST_NUMBER else 'no model that works has such numbers: look for what overflowed'}."
        )


def validate_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the tags, each once. Raises ValueError unless they are words that are not empty, and not one string."""
    is_list = isinstance(tags, Iterable) and not isinstance(tags, str)
    words = list(tags) if is_list else []
    if not is_list or not all(map(is_word, words)):
        raise ValueError(
            f'`tags` must be a list of strings that are not empty, got {got(tags)}; one tag is `["notes"]`.'
        )
    return tuple(dict.fromkeys(words))


def validate_source(
    token_ids: Iterable[int] | Tensor | None,
    text: str | None,
    char_ends: Iterable[int] | Tensor | None,
    num_tokens: int,
    document: Document,
) -> SourcePart | None:
    """Return what tokens came from, None if that is not given; all parts of a document must give the same.

    The last token takes the text that follows it.
    """
    source = document.newest_source
    for argument, given, known in (
        ("token_ids", token_ids, source is not None),
        ("text", text, source is not None and source.has_text),
    ):
        if document.serial >= 0 and known != (given is not None):
            raise ValueError(
                f"`{argument}` must be given for every part of a document or for none, got "
                f"{'none' if known else 'some'} for a document that was started {'with' if known else 'without'}."
            )
    if (text is None) != (char_ends is None) or (text is not None and token_ids is None):
        raise ValueError(
            "`text` needs `char_ends` and `token_ids`, and `char_ends` needs `text`; give all or leave out both."
        )
    if token_ids is None:
        return None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {type(text).__name__}; leave it out where it is not known.")
    ids = _validate_integers("token_ids", token_ids, num_tokens)
    if int(ids.min()) < 0 or int(ids.max()) > LARGEST_TOKEN_ID:
        raise ValueError(
            f"`token_ids` must be from 0 to {LARGEST_TOKEN_ID}, got {int(ids.min())} to {int(ids.max())}; pass the ids "
            "of a tokenizer."
        )
    if text is None or char_ends is None:
        return SourcePart(ids)
    ends = _validate_integers("char_ends", char_ends, num_tokens).clone()
    if (ends.diff() < 0).any() or ends[0] < 0 or ends[-1] > len(text):
        raise ValueError(
            f"`char_ends` must rise from 0 to at most the length of `text`, {len(text)}, got {int(ends.min())} to "
            f"{int(ends.max())}{', not in order' if (ends.diff() < 0).any() else ''}; a tokenizer's offset mapping has them."
        )
    ends[-1] = len(text)
    return SourcePart(ids, text, ends)


def _validate_integers(argument: str, values: Iterable[int] | Tensor, num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the values as int64 on the CPU."""
    try:
        ids: Any = values if isinstance(values, Tensor) else torch.as_tensor(list(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{argument}` must be a flat list of integers, got {got(values)}; pass one row of a batch."
        ) from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"`{argument}` must be a flat list of integers, got {tuple(ids.shape)} {ids.dtype}; pass one row of a batch."
        )
    if len(ids) != num_tokens:
        raise ValueError(
            f"`{argument}` must name each token of `keys`, got {len(ids)} ids for {num_tokens} tokens; pass the "
            "ids that were encoded, without padding."
        )
    return ids.detach().to("cpu", torch.int64)


def validate_weighing(**given: object) -> None:
    """Raise ValueError unless `scaling`, `newest` (-inf: of nothing) and `selection` are what they must be, or None."""
    for argument, value in given.items():
        if value is not None:
            WEIGHING[argument](argument, value)


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


WEIGHING = {
    "scaling": rule(
        "a positive number", lambda it: _is_number(it, math.ulp(0)), "attention multiplies inner products by it"
    ),
    "newest": rule("seconds since 1970", lambda it: _is_number(it, -math.inf), "leave it out for the newest date"),
    "selection": rule("a Selection", _has("rows"), "`bank.select([...])` reads some documents"),
}


def refuse_strict_alone(strict: bool, model: object) -> None:
    """Raise ValueError if a bank is to be read as it is, and nobody is there to read it."""
    if not strict and model is None:
        raise ValueError(
            "`strict` must be True where no `model` is given, got False; pass the model that is to read the bank."
        )


def refuse_search(queries: Tensor, num_chunks: object, shape: LayerShape | None) -> None:
    """Raise ValueError where queries do not fit the layer (None: nothing was ever written), or ask for no chunk."""
    validate_count("num_chunks", num_chunks, MOST_CHUNKS)
    validate_tensor("queries", queries)
    if not queries.is_floating_point() or queries.is_meta:
        kind = f"{queries.dtype} on {queries.device}"
        raise ValueError(f"`queries` must be floating-point numbers, as keys are, got {kind}; convert them.")
    if queries.ndim != 3 or (shape is not None and (queries.shape[0], queries.shape[2]) != shape[:2]):
        wanted = "(kv_heads, queries, dim)" if shape is None else f"({shape.kv_heads}, queries, {shape.key_dim})"
        raise ValueError(
            f"`queries` must have the shape {wanted} of the stored keys, got {tuple(queries.shape)}; put the query "
            "heads that share a key-value head side by side in `queries`."
        )


def dated_document(
    document_id: str, tags: Iterable[str] = (), dated: object = None, valid_until: object = None
) -> Document:
    """Return the record of a new document, after a check of what is said of it."""
    start = None if dated is None else validate_date("dated", dated)
    end = None if valid_until is None else validate_date("valid_until", valid_until)
    if start is not None and end is not None and end <= start:
        raise ValueError(
            f"`valid_until` must be later than `dated`, got {end} and {start}; leave out what is not known."
        )
    return Document(document_id, tags=validate_tags(tags), dated=start, valid_until=end)


def validate_date(argument: str, date: object) -> float:
    """Return a date as a float. Raises ValueError unless it is a number of seconds since 1970."""
    if not isinstance(date, int | float) or isinstance(date, bool) or not FIRST_DATE <= date <= LAST_DATE:
        raise ValueError(
            f"`{argument}` must be a number of seconds since 1970, in the years 1 to 9999, or None, got {date!r}; a datetime "
            "has `.timestamp()`, and milliseconds are to be divided by 1,000."
        )
    return float(date)


FLAGS = (
    ("append", "create_pr", "exact", "is_main_process", "is_pinned", "mmap", "output_loading_info", "private", "probe")
    + ("push_to_hub", "read_only", "return_buffers", "save_backbone", "skip_special_tokens", "strict")
    + ("strict_backbone",)
)
STRINGS = ("commit_description", "commit_message", "repo_id", "revision", "subfolder", "variant")
COUNTS = ("batch_size", "device_budget", "k", "new_num_tokens", "pad_to_multiple_of")
# By the name of the argument, which means the same wherever it is taken. What depends on a bank or a model is checked there.
RULES: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(FLAGS, validate_flag),
    **dict.fromkeys(STRINGS, validate_string),
    **dict.fromkeys(COUNTS, validate_count),
    **dict.fromkeys(("keep", "seed", "window"), validate_integer),
    **dict.fromkeys(
        ("budget_tokens", "max_new_tokens", "start", "stop"), functools.partial(validate_integer, least=0, most=MOST)
    ),
    **dict.fromkeys(("folder", "save_directory"), validate_folder),
    **dict.fromkeys(("by", "document_id"), validate_document_id),
    **dict.fromkeys(("dated", "now", "valid_until"), validate_date),
    **dict.fromkeys(("backbone_options", "state", "state_dict"), validate_mapping),
    **dict.fromkeys(("backbone", "pretrained_model_name_or_path"), validate_name),
    "bank": validate_bank,
    "device": validate_device,
    "fingerprint": validate_fingerprint,
    "model": validate_model,
    "origin": validate_integer,
    "origin_id": validate_document_id,
    "part": validate_part,
    "progress": validate_callable,
    "rows": validate_rows,
    "segment": validate_segment,
    "workers": validate_models,
}
