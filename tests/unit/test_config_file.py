"""serve_config.yaml is refused with the place and the nearest valid key, wherever the mistake is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import config_docs
from deployments.config_file import load_config_file
from tempo_router.config import StrictModel, TempoConfig
from tempo_router.errors import ConfigError

ROOT = Path(__file__).parents[2]

DEPLOY: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8001},
    "applications": [
        {
            "name": "tempo",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "deployments": [{"name": "ingress", "max_ongoing_requests": 7, "autoscaling_config": {"min_replicas": 1}}],
            "args": {"data_dir": "state", "scheduling": {"policy": "edf"}},
        }
    ],
}


def changed(path: str, key: str, value: Any) -> dict[str, Any]:
    """DEPLOY with one key more, at a place such as `applications.0.args`."""
    deploy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(DEPLOY))
    section: Any = deploy
    for part in path.split(".") if path else []:
        section = section[int(part)] if part.isdecimal() else section.setdefault(part, {})
    section[key] = value
    return deploy


def load(tmp_path: Path, deploy: Any, overrides: tuple[str, ...] = (), port: int | None = None):
    path = tmp_path / "serve_config.yaml"
    path.write_text(deploy if isinstance(deploy, str) else yaml.safe_dump(deploy))
    return load_config_file(path, overrides, port)


def test_the_default_file_is_the_default_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its values are there to be seen and changed, not because they differ."""
    monkeypatch.chdir(tmp_path)
    loaded = load_config_file(ROOT / "serve_config.yaml")

    assert loaded.config == TempoConfig(data_dir=str(tmp_path / ".tempo"))
    assert (loaded.host, loaded.port, loaded.route_prefix) == ("127.0.0.1", 8000, "")


def test_the_default_file_shows_every_section() -> None:
    args = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]
    sections = {
        name
        for name, field in TempoConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel)
    }
    assert sections <= args.keys()


@pytest.mark.parametrize(
    ("path", "key", "said"),
    [
        ("", "http_option", r"top level: unknown key 'http_option'; did you mean 'http_options'\?"),
        ("http_options", "prot", r"http_options: unknown key 'prot'; did you mean 'port'\?"),
        ("applications.0", "imports_path", r"applications\[0\]: unknown key .* did you mean 'import_path'\?"),
        (
            "applications.0.deployments.0",
            "max_ongoing_reqs",
            r"applications\[0\]\.deployments\[0\]: unknown key .* did you mean 'max_ongoing_requests'\?",
        ),
        (
            "applications.0.deployments.0.autoscaling_config",
            "max_replica",
            r"deployments\[0\]\.autoscaling_config: unknown key 'max_replica'; did you mean 'max_replicas'\?",
        ),
        (
            "applications.0.deployments.0.ray_actor_options",
            "num_cpu",
            r"deployments\[0\]\.ray_actor_options: unknown key 'num_cpu'; did you mean 'num_cpus'\?",
        ),
        ("applications.0.args", "modle", r"applications\[0\]\.args: unknown key 'modle'; did you mean 'model'\?"),
        ("applications.0.args.scheduling", "polcy", r"args\.scheduling: unknown key .* did you mean 'policy'\?"),
        ("applications.0.args.transport", "lease_ms", r"args\.transport: unknown key .* did you mean 'lease_s'\?"),
        ("applications.0.args.ingress", "zzz", r"args\.ingress: unknown key 'zzz'; valid keys are .*replicas"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_valid_one(tmp_path: Path, path: str, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, changed(path, key, 1))


@pytest.mark.parametrize(
    ("path", "key", "value", "said"),
    [
        ("http_options", "port", "web", r"http_options\.port: .*got 'web'"),
        ("http_options", "port", 70000, r"http_options\.port"),
        ("applications.0", "import_path", "nowhere", r"applications\[0\]"),
        ("applications.0.args", "model", 7, r"args\.model: .*string, got 7"),
        ("applications.0.args", "name", "My App", r"args\.name: .*got 'My App'"),
        ("applications.0.args.workers", "replicas", 0, r"args\.workers\.replicas: .*greater than or equal to 1, got 0"),
        ("applications.0.args.scheduling", "policy", "fifo", r"args\.scheduling\.policy: .*'fcfs'.*got 'fifo'"),
        ("applications.0.args.scheduling", "tick_s", float("nan"), r"args\.scheduling\.tick_s: .*got nan"),
        ("applications.0.args.scheduling", "tick_s", float("inf"), r"args\.scheduling\.tick_s: .*got inf"),
        ("applications.0.args", "default_tier", "gold", r"args: default_tier 'gold' is not a tier; tiers are"),
        ("applications.0.args", "tiers", {"chat": {"class": "latency", "ttft_ms": 1}}, r"args\.tiers\.chat: .*tbt_ms"),
        (
            "applications.0.args",
            "tiers",
            {"chat": {"clas": "latency"}},
            r"args\.tiers\.chat: .* did you mean 'class'\?",
        ),
        ("applications.0.args", "scheduling", [], r"args\.scheduling: "),
        ("applications.0", "args", [], r"applications\[0\]\.args"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, path: str, key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, changed(path, key, value))


def test_all_mistakes_of_a_section_are_said_at_once(tmp_path: Path) -> None:
    deploy = changed("applications.0.args", "workers", {"replicas": 0, "num_cpus": -1})
    with pytest.raises(ConfigError) as error:
        load(tmp_path, deploy)
    assert "args.workers.replicas" in str(error.value)
    assert "args.workers.num_cpus" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no mapping"),
        ("- a\n- b\n", "holds no mapping"),
        ("a: [1\n", "is not YAML"),
        ("applications: []\nhttp_options: {port: 1, port: 2}\n", "key 'port' is given twice"),
        ("http_options: {port: 1}\n", "applications"),
        ("applications: []\n", "0 applications have import_path 'deployments.app:build'"),
        ("applications: 3\n", "applications"),
    ],
)
def test_a_file_that_says_nothing_usable_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml cannot be read: No such file"):
        load_config_file(tmp_path / "nope.yaml")


def test_two_names_for_one_application_are_refused(tmp_path: Path) -> None:
    """The handle is found by Serve's name, the router and the Redis keys by ours."""
    with pytest.raises(ConfigError, match=r"Serve's name is 'tempo' but args\.name is 'other'"):
        load(tmp_path, changed("applications.0.args", "name", "other"))


def test_values_given_with_the_command_win(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        DEPLOY,
        ("scheduling.policy=fcfs", "workers.env.A=b", "engine.engine_kwargs={max_model_len: 512}", "redis_url=null"),
        port=9123,
    )

    assert loaded.port == 9123
    assert loaded.config.scheduling.policy == "fcfs"
    assert loaded.config.workers.env == {"A": "b"}
    assert loaded.config.engine.engine_kwargs == {"max_model_len": 512}
    assert loaded.deploy["applications"][0]["args"]["scheduling"]["policy"] == "fcfs"
    assert loaded.deploy["http_options"] == {"host": "127.0.0.1", "port": 9123}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy", "write key=value"),
        ("=3", "write key=value"),
        ("scheduling.polcy=edf", "did you mean 'policy'"),
        ("model.name=x", "unknown key|string"),
        ("data_dir.deep.er=1", "'data_dir' is a value, not a section"),
        ("scheduling.policy=[", "the value is not YAML"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, DEPLOY, (override,))


def test_paths_do_not_depend_on_where_other_processes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, DEPLOY)
    assert loaded.config.data_dir == str(tmp_path / "state")
    assert loaded.deploy["applications"][0]["args"]["data_dir"] == str(tmp_path / "state")


def test_what_goes_to_serve_is_accepted_by_the_builder(tmp_path: Path) -> None:
    """Serve validates args once more; aliases such as `class` have to survive the way there."""
    loaded = load(tmp_path, DEPLOY)
    assert TempoConfig.model_validate(loaded.deploy["applications"][0]["args"]) == loaded.config


def test_every_key_is_described() -> None:
    def undescribed(model: type[StrictModel], path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
                found += undescribed(field.annotation, f"{path}{name}.")
            elif not field.description:
                found.append(path + name)
        return found

    assert undescribed(TempoConfig, "") == []


def test_the_configuration_page_is_current() -> None:
    assert config_docs.PATH.read_text() == config_docs.render(), "run `make docs`"


def test_the_page_has_the_sections_inside_sections_and_the_values_of_lists():
    page = config_docs.render()
    assert "## `scheduling.switches`" in page
    assert "list of `session`, `openai`, `trace`, `prefix`" in page
