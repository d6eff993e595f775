"""Reads serve_config.yaml strictly: every key at every level, ours and Serve's, must be one that somebody reads.

Serve itself accepts unknown keys silently: a misspelt `max_ongoing_requests` serves five requests at a time and says
nothing. Keys are checked against the pydantic models of the installed Serve, so a new Serve brings its new keys.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from tempo_router.config import TempoConfig, unknown_key_message
from tempo_router.errors import ConfigError

IMPORT_PATH = "deployments.app:build"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A checked file: what goes to Serve, and our own part of it.

    deploy: the file with all overrides applied, for Serve. config: `args` of our application.
    """

    path: Path
    deploy: dict[str, Any]
    config: TempoConfig

    @property
    def host(self) -> str:
        """Address that the HTTP proxy binds."""
        return str(self._schema().http_options.host)

    @property
    def port(self) -> int:
        """Port that the HTTP proxy binds."""
        return int(self._schema().http_options.port)

    @property
    def route_prefix(self) -> str:
        """Path under which the application answers, without a slash at the end."""
        application = next(each for each in self._schema().applications if each.import_path == IMPORT_PATH)
        return (application.route_prefix or "").rstrip("/")

    def _schema(self) -> ServeDeploySchema:
        return ServeDeploySchema.model_validate(self.deploy)


def load_config_file(path: Path, overrides: typing.Sequence[str] = (), port: int | None = None) -> ConfigFile:
    """Read and check a file. Raises ConfigError that lists what is wrong, each with its place.

    Serve's part is checked first: ours is not looked at while that one is broken.

    overrides: "key.key=value" for `args` of our application, the value in YAML. port: replaces http_options.port.
    """
    deploy = _read(path)
    problems = list(_unknown_keys(ServeDeploySchema, deploy, ""))
    problems += _serve_problems(deploy) if not problems else []
    if problems:
        raise _refusal(path, problems)
    if port is not None:
        deploy["http_options"] = {**(deploy.get("http_options") or {}), "port": port}
        problems += _serve_problems(deploy)
    index, application = _our_application(path, deploy)
    args = application.get("args") or {}
    for override in overrides:
        _apply(args, override)
    config, args_problems = _check_args(args, f"applications[{index}].args")
    problems += args_problems
    problems += _name_problems(config, application, index)
    if config is None or problems:
        raise _refusal(path, problems)
    # Relative to where the command was given; the processes that use it start elsewhere.
    config = config.model_copy(update={"data_dir": str(Path(config.data_dir).expanduser().absolute())})
    application["args"] = config.model_dump(mode="json", by_alias=True)
    return ConfigFile(path=path, deploy=deploy, config=config)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicatesLoader)  # noqa: S506 - a SafeLoader
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}; name the file as in: tempo serve PATH") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values; see docs/configuration.md")
    return content


class _NoDuplicatesLoader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but a key written twice is an error: PyYAML would keep the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _unknown_keys(model: type[BaseModel], value: Any, path: str) -> Iterator[str]:
    """Walk a value beside its pydantic model, and yield a problem for each key that the model does not have."""
    if not isinstance(value, dict):
        return
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, child in value.items():
        child_path = f"{path}.{key}" if path else str(key)
        if key not in fields:
            yield f"{path or 'top level'}: {unknown_key_message(str(key), fields)}"
            continue
        nested, is_list = _nested_model(fields[key].annotation)
        if nested is None:
            continue
        if not is_list:
            yield from _unknown_keys(nested, child, child_path)
        elif isinstance(child, list):
            for i, item in enumerate(child):
                yield from _unknown_keys(nested, item, f"{child_path}[{i}]")


def _nested_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model inside an annotation such as `Optional[M]`, `List[M]` or `Union[Dict, M]`; whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    if origin is list:
        return _nested_model(typing.get_args(annotation)[0])[0], True
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            nested = _nested_model(option)
            if nested[0] is not None:
                return nested
    return None, False


def _serve_problems(deploy: dict[str, Any]) -> list[str]:
    try:
        schema = ServeDeploySchema.model_validate(deploy)
    except ValidationError as e:
        return _readable(e, "")
    port = schema.http_options.port
    return [] if 0 < port < 65536 else [f"http_options.port: a port is a number from 1 to 65535, got {port}"]


def _our_application(path: Path, deploy: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    ours = [(i, each) for i, each in enumerate(deploy["applications"]) if each["import_path"] == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: {len(ours)} applications have import_path {IMPORT_PATH!r}; `tempo` serves exactly one"
            " (for several, give each its own name, data_dir and route_prefix and use `serve run`)"
        )
    return ours[0]


def _apply(args: dict[str, Any], override: str) -> None:
    """Set one value; an unknown key on the way is found by the check of the whole."""
    keys, equals, text = override.partition("=")
    if not equals or not keys.strip():
        raise ConfigError(f"--set {override!r}: write key=value, such as scheduling.policy=edf")
    *parents, last = keys.strip().split(".")
    section = args
    for parent in parents:
        inner = section.setdefault(parent, {})
        if inner is None:
            inner = section[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
        section = inner
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {e}") from e


def _check_args(args: dict[str, Any], path: str) -> tuple[TempoConfig | None, list[str]]:
    try:
        return TempoConfig.model_validate(args), []
    except ValidationError as e:
        return None, _readable(e, path)


def _name_problems(config: TempoConfig | None, application: dict[str, Any], index: int) -> list[str]:
    serve_name = application.get("name", "default")
    if config is None or serve_name == config.name:
        return []
    problem = f"Serve's name is {serve_name!r} but args.name is {config.name!r}; give both the same value"
    return [f"applications[{index}]: {problem}"]


def _readable(error: ValidationError, path: str) -> list[str]:
    return [f"{_place(path, each['loc'])}: {_message(each)}" for each in error.errors(include_url=False)]


def _place(path: str, location: tuple[int | str, ...]) -> str:
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part:  # pydantic names the branch of a union, such as `constrained-int`
            path += f".{part}" if path else part
    return path or "top level"


def _message(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error["input"]
    if error["type"] == "missing" or isinstance(given, dict | list):
        return message
    return f"{message}, got {given!r}"


def _refusal(path: Path, problems: list[str]) -> ConfigError:
    return ConfigError(f"{path} cannot be used:" + "".join(f"\n  {problem}" for problem in dict.fromkeys(problems)))
