"""The process behind `tempo serve`: what it says. What it does is tested with a real Ray, in tests/e2e."""

from deployments import serve_process
from tempo_router.config import TempoConfig


def test_a_failed_start_ends_with_the_error_itself() -> None:
    """Serve wraps it in tracebacks of its own; the worker's reason is what the user needs."""
    worker = (
        "worker: The deployment failed to start 3 times in a row. Error:\n"
        "ray::ServeReplica:tempo:worker.initialize() (pid=1)\n"
        '  File "replica.py", line 1, in initialize\n'
        "RuntimeError: no weights\n\nThe above exception was the direct cause:\n\n"
        "tempo_router.errors.EngineStartError: vLLM could not start with model '/m': no weights"
    )
    said = serve_process._why_failed("tempo could not start. DEPLOY_FAILED", [worker, "ingress: is slow"])

    assert said.splitlines()[0] == "tempo could not start. DEPLOY_FAILED"
    assert worker in said
    assert said.splitlines()[-1] == (
        "tempo: could not start: tempo_router.errors.EngineStartError: vLLM could not start with model '/m': no weights"
    )


def test_a_failed_start_without_an_error_says_what_there_is() -> None:
    assert serve_process._why_failed("summary", ["worker: no GPU"]) == "summary\nworker: no GPU"


def test_the_banner_shows_a_request_that_can_be_pasted() -> None:
    banner = serve_process._banner(TempoConfig(), "http://127.0.0.1:8000")
    assert "ready at http://127.0.0.1:8000" in banner
    assert "curl -N http://127.0.0.1:8000/v1/chat/completions" in banner
    assert '"slo": {"ttft_ms": 1000, "tbt_ms": 100}' in banner
