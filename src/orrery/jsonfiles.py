"""Files of jobs: JSON, JSON Lines and YAML read into objects, and one line about everything that is wrong with a job.

What `jobs` (Cosmos-Predict2.5) and `specs` (Cosmos-Transfer2.5) share. A message names the file, the key, the value and
what is allowed.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from orrery.errors import InputError

FILE_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_NAME = 200  # bytes; a file system allows 255, and suffixes follow


def _file_name(name: str) -> str:
    wrong = not name.strip() or name.startswith(".") or re.search(r"[/\\]", name) or not name.isprintable()
    if wrong or len(name.encode()) > LONGEST_NAME:
        raise ValueError("not a file name")
    return name


def no_bool(value: Any) -> Any:
    """For numbers: pydantic takes true and false for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _text(text: str) -> str:
    text.encode()  # JSON can hold halves of a surrogate pair, which nothing can write or read
    return text


def says(allowed: str) -> Any:
    """What a key allows, for messages."""
    return Field(description=allowed)


Text = Annotated[str, AfterValidator(_text)]
Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
COUNT = "a whole number of at least 1"
Name = Annotated[
    str,
    AfterValidator(_file_name),
    says(f"text that can be a file name: no / or \\, no dot in front, at most {LONGEST_NAME} bytes"),
]
Seed = Annotated[int, BeforeValidator(no_bool), Field(ge=0, lt=2**32), says(f"a whole number from 0 to {2**32 - 1}")]
Guidance = Annotated[
    Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)] | None, says("a number of at least 0")
]


class Named(Protocol):
    """A job that was read."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


@dataclass
class Draft:
    """The keys of one job as they were read, and the faults found in them so far.

    folder: of the file, which its paths are relative to. overrides: keys that win over the file's. called: what an
    override is called in messages, such as the option that gave it.
    """

    tree: dict[str, Any]
    folder: Path
    source: str
    overrides: Mapping[str, Any]
    faults: list[str]
    called: Mapping[str, str] = field(default_factory=dict)

    def checked(
        self, model: type["K"], required: Sequence[str], instead: Sequence[Collection[str]]
    ) -> tuple["K", Collection[str]]:
        """The keys with overrides in place; and those whose values are impossible, for which defaults stand in.

        Args:
            instead: groups of keys that say the same thing: an override of one replaces all that the file has.
        """
        replaced = {key for group in instead if self.overrides.keys() & set(group) for key in group}
        tree = {key: value for key, value in self.tree.items() if key in model.model_fields and key not in replaced}
        tree |= self.overrides
        for key in required:
            if key not in tree:
                self.faults.append(f"missing key {key} (allowed: {model.model_fields[key].description})")
        return self.validated(model, tree)

    def validated(self, model: type["K"], tree: dict[str, Any], prefix: str = "") -> tuple["K", Collection[str]]:
        """As `checked`, of keys that are known and in place; prefix: of a block's keys in messages."""
        try:
            return model.model_validate(tree), ()
        except ValidationError as error:
            wrong = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors(include_url=False))
        for key in wrong:
            self.fault(prefix + key, tree[key], model.model_fields[key].description or "")
        return model.model_validate({key: value for key, value in tree.items() if key not in wrong}), wrong

    def prompt(self, prompt: str | None, prompt_path: Path | None, wrong: Collection[str]) -> str:
        """The prompt, or "" and a fault."""
        if prompt is not None and prompt_path is not None:
            self.faults.append(f"prompt and prompt_path = {short(prompt_path)} both given; allowed: one of them")
        elif prompt is not None:
            if prompt.strip():
                return prompt
            self.fault("prompt", prompt, "text that says something")
        elif prompt_path is not None:
            return self._prompt_in(prompt_path)
        elif not {"prompt", "prompt_path"} & set(wrong):
            told = self.called.get("prompt", "key prompt")
            self.faults.append(f"missing {told} (allowed: text, or prompt_path with a text file)")
        return ""

    def _prompt_in(self, told: Path) -> str:
        path = self.place("prompt_path", told)
        if not os.path.isfile(path):
            self.fault("prompt_path", told, f"an existing text file; {short(path)} is {absent(path)}")
            return ""
        try:
            prompt = read_text(path).strip()
        except InputError as error:
            self.fault("prompt_path", told, f"a text file; {error}")
            return ""
        if not prompt:
            self.fault("prompt_path", told, "a text file that says something; it is empty")
        return prompt

    def place(self, key: str, path: Path) -> Path:
        """A path of a file is relative to that file, one of an override to the working directory."""
        return (Path() if key in self.overrides else self.folder) / os.path.expanduser(path)

    def fault(self, key: str, value: Any, allowed: str) -> None:
        """Note that this value cannot be."""
        self.faults.append(f"{self.label(key)} = {short(value)} (allowed: {allowed})")

    def label(self, key: str) -> str:
        """A key in a message."""
        return self.called.get(key, f"override {key}") if key in self.overrides else key

    def refuse(self) -> None:
        """Raises:
        InputError: everything that is wrong with this job, in one line.
        """
        if self.faults:
            where = f"{self.source}: " if self.source else ""
            raise InputError(where + "; ".join(self.faults))


K = TypeVar("K", bound=BaseModel)
D = TypeVar("D", bound=Draft)
N = TypeVar("N", bound=Named)


def settle_drafts(drafts: Sequence[D], settle: Callable[[D], N]) -> list[N]:
    """All jobs.

    Raises:
        InputError: all faults of the first faulty job, and how many other jobs have faults; a name used twice.
    """
    jobs, wrong = [], []
    for draft in drafts:
        try:
            jobs.append(settle(draft))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        more = f"; {len(wrong) - 1} more of the {len(drafts)} jobs have faults" if len(wrong) > 1 else ""
        raise InputError(wrong[0] + more)
    first: dict[str, N] = {}
    for job in jobs:
        other = first.setdefault(job.name, job)
        if other is not job:
            raise InputError(
                f"name = {job.name!r} is used twice, in {other.source} and in {job.source}; allowed: once in all files"
            )
    return jobs


def existing_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, if all of them can be files of jobs.

    Raises:
        InputError: none given, another suffix, missing.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise InputError(f"no job files given; allowed are {' '.join(FILE_SUFFIXES)}")
    for file in files:
        if file.suffix.lower() not in FILE_SUFFIXES:
            raise InputError(f"cannot read jobs from {file}: allowed suffixes are {' '.join(FILE_SUFFIXES)}")
    if missing := [f"{file} ({absent(file)})" for file in files if not os.path.isfile(file)]:
        raise InputError(f"cannot read jobs from {', '.join(missing)}")
    return files


def read_objects(file: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Where each object of a file stands ("jobs.jsonl line 3"), and the object.

    Raises:
        InputError: no JSON or YAML, no objects in it, something else among them.
    """
    found = list(_objects(file, read_text(file)))
    if not found:
        raise InputError(f"{file} holds no jobs; allowed: at least one object with the keys of a job")
    for source, tree in found:
        if not isinstance(tree, dict):
            raise InputError(f"{source}: {short(tree)} is no job; allowed: an object with the keys of a job")
        yield source, tree


def _objects(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file} line {number}", _parse_json(file, line, number)
        return
    if not text.strip():
        return
    tree = _parse_json(file, text) if file.suffix.lower() == ".json" else _parse_yaml(file, text)
    if isinstance(tree, list):
        yield from ((f"{file} item {number}", item) for number, item in enumerate(tree, 1))
    else:
        yield str(file), tree


def _parse_json(file: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file} is not JSON: line {line}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        where = f"{file} line {first_line}" if file.suffix.lower() == ".jsonl" else file
        raise InputError(f"cannot read jobs from {where}: {error}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once([key for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: list[Any]) -> None:
    """The parsers keep the last of two equal keys and say nothing: a sample would be lost."""
    if len(keys) > len(set(keys)):
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"the key {twice!r} is there twice in one object; allowed: once")


def _parse_yaml(file: Path, text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            _check_once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        raise InputError(f"{file} is not YAML: line {mark.line + 1}, column {mark.column + 1}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read jobs from {file}: {' '.join(str(error).split())}") from None


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} could not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text; allowed: UTF-8") from None


def absent(path: Path) -> str:
    """Why there is no file of that name."""
    return "a folder" if os.path.isdir(path) else "no such file"


def unknown(
    tree: Mapping[Any, Any],
    allowed: Sequence[str],
    what: str = "key",
    prefix: str = "",
    hints: Mapping[str, str] = {},
) -> list[str]:
    """One fault that names all keys that are not allowed, each with the one that was probably meant; or none.

    Args:
        prefix: of a block's keys. hints: what to say of known slips, in place of the key that is spelt most alike.
    """
    found = []
    for key, value in tree.items():
        if key not in allowed:
            close = difflib.get_close_matches(str(key).lower(), allowed, 1)
            hint = hints.get(str(key)) or (f"did you mean {prefix}{close[0]}?" if close else "")
            name = short(f"{prefix}{key}" if prefix else key)
            found.append(f"{name} = {short(value)}" + (f" ({hint})" if hint else ""))
    return [f"unknown {what} {', '.join(found)} (allowed: {', '.join(allowed)})"] if found else []


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3


def short(value: Any) -> str:
    """A value for a message: one line, not too long, however much a file holds."""
    return _REPR.repr(str(value) if isinstance(value, os.PathLike) else value)
