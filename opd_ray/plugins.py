"""Built-in by short name, yours by ``package.module:attribute``: the only dynamic import."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from opd_ray.errors import ConfigError

__all__ = ["check_arguments", "check_construction", "load"]


def load(name: str, builtins: Mapping[str, str], kind: str) -> Any:
    """The attribute that a name stands for.

    Args:
        name: a key of ``builtins``, or ``package.module:attribute``.
        builtins: short name -> ``package.module:attribute``; imported only when asked for.
        kind: what it is ("family", "reward"), for error messages.

    Raises:
        ConfigError: the name is unknown, its module cannot be imported, or has no such attribute.
    """
    if ":" not in name and name not in builtins:
        raise ConfigError(
            f"{kind} {name!r} is unknown. Known: {', '.join(sorted(builtins)) or 'none'}. "
            f"For your own use package.module:attribute"
        )
    module_name, _, attribute = builtins.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{kind} {name!r}: cannot import {module_name!r} ({error}). Install it or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # a module of the user's may raise anything when it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{kind} {name!r}: importing {module_name!r} raised {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno})"
        ) from error
    if not hasattr(module, attribute):
        public = sorted(key for key in vars(module) if not key.startswith("_"))
        raise ConfigError(f"{kind} {name!r}: {module_name} has no {attribute!r}; it has {', '.join(public)}")
    return getattr(module, attribute)


def check_arguments(target: Callable[..., Any], args: Mapping[str, Any], where: str) -> None:
    """Refuse keyword arguments that ``target`` does not take.

    Args:
        target: a function, or a class whose constructor will be called.
        args: the keyword arguments that the configuration gives.
        where: the place in the configuration, for error messages.

    Raises:
        ConfigError: names the argument, and what the target takes.
    """
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [parameter.name for parameter in parameters if parameter.kind in keyword]
    for name in args:
        if name not in taken:
            title = getattr(target, "__qualname__", repr(target))
            raise ConfigError(f"{where}: {title} takes no argument {name!r}; it takes {', '.join(taken) or 'none'}")


def check_construction(kind: type, args: Mapping[str, Any], where: str) -> None:
    """Refuse keyword arguments with which a class cannot be made: unknown ones, and missing ones.

    Raises:
        ConfigError: names the argument, and what the class takes.
    """
    check_arguments(kind, args, where)
    parameters = inspect.signature(kind).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in variable and parameter.name not in args
    ]
    if missing:
        raise ConfigError(f"{where}: {kind.__qualname__} needs {', '.join(missing)}")
