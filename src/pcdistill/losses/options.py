"""Options of a loss: read from its signature and docstring; declared once, where there are many of them."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from pcdistill.plain import NUMBER, shown

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One option of a loss.

    Attributes:
        name: the key in a recipe.
        type: what it takes, in words: "number", "list of whole numbers", '"both" | "f2cl"'.
        default: as Python writes it; None where the option must be given.
        about: the first sentence of its documentation.
    """

    name: str
    type: str
    default: str | None
    about: str


def takes(options: type) -> Callable[[T], T]:
    """Give a function or a class with `**options` the signature of the frozen dataclass that they go to."""

    def with_signature(made: T) -> T:
        own = list(inspect.signature(made).parameters.values()) if not isinstance(made, type) else []
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        signature = inspect.Signature([*named, *inspect.signature(options).parameters.values()])
        made.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it, its types do not know it
        if isinstance(made, type):
            made.options = options  # type: ignore[attr-defined]  # a class in general has none
        return made

    return with_signature


def values_of(options: Any) -> dict[str, Any]:
    """The values of a dataclass of options by name, those that are fixed among them."""
    return {field.name: getattr(options, field.name) for field in fields(options)}


def options_of(loss_class: Callable[..., Any], without: Sequence[str] = ()) -> list[Option]:
    """The options of a loss's class, in the order of its signature, without the names that are not for recipes."""
    about: dict[str, str] = {}
    for source in _documented(loss_class):
        about = {**_arguments(inspect.getdoc(source) or ""), **about}
    hints = _hints(loss_class)
    return [
        Option(
            name,
            words_of(hints.get(name, Any)),
            None if parameter.default is parameter.empty else repr(parameter.default),
            re.split(r"(?<=\.)\s", about.get(name, ""), maxsplit=1)[0].rstrip("."),
        )
        for name, parameter in inspect.signature(loss_class).parameters.items()
        if name not in without and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def fitted(loss_class: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as their types: text that is a number becomes one, as everywhere in a recipe.

    Options whose type is no plain one, such as a user's own, are left as they are.

    Raises:
        ValueError: naming the option whose value is of another type.
    """
    try:
        hints = _hints(loss_class)
    except (NameError, TypeError, AttributeError):  # a user's annotation that cannot be looked up
        return dict(options)
    found = {}
    for name, value in options.items():
        form = _form(hints.get(name, Any))
        try:
            made = value if form is None else TypeAdapter(form).validate_python(value)
        except ValidationError:
            raise ValueError(f"{name} must be {words_of(hints[name])}, got {shown(value)}") from None
        found[name] = value if made == value else made
    return found


def _form(hint: Any) -> Any:
    """A type whose numbers take no true or false; None if it is no plain one."""
    if hint in (bool, str, type(None)):
        return hint
    if hint in (float, int):
        return Annotated[hint, NUMBER]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return hint
    if origin in (types.UnionType, typing.Union):
        forms = [_form(part) for part in inside]
        return None if None in forms else typing.Union[tuple(forms)]  # noqa: UP007
    if isinstance(origin, type) and issubclass(origin, Sequence):
        form = _form(inside[0])
        return None if form is None else tuple[form, ...] if origin is tuple else list[form]  # type: ignore[valid-type]
    return None


def words_of(hint: Any) -> str:
    """A type in words."""
    plain = {float: "number", int: "whole number", bool: "true or false", str: "text", type(None): "none", Any: ""}
    if hint in plain:
        return plain[hint]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(repr(value).replace("'", '"') for value in inside)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(words_of(part) for part in inside)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {words_of(inside[0])}s"
    return str(getattr(hint, "__name__", hint))


def _documented(loss_class: Any) -> Iterator[Any]:
    """What may document the options: the class, its dataclass of options, what its docstring names, its parents."""
    for part in inspect.getmro(loss_class) if isinstance(loss_class, type) else (loss_class,):
        yield part
        if "options" in vars(part):
            yield from inspect.getmro(vars(part)["options"])
        module = inspect.getmodule(part)
        for name in re.findall(r":func:`(\w+)`", part.__doc__ or ""):
            if hasattr(module, name):
                yield getattr(module, name)


def _hints(loss_class: Any) -> dict[str, Any]:
    made: Any = loss_class
    if not isinstance(loss_class, type):
        return typing.get_type_hints(loss_class)
    if hasattr(loss_class, "options"):
        return typing.get_type_hints(loss_class.options)
    return typing.get_type_hints(made.__init__)


def _arguments(docstring: str) -> dict[str, str]:
    """Names and texts of the section "Args:"."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", docstring, flags=re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
