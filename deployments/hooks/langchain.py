"""LangGraph and LangChain: a run is a program, a node its step, without a change to the graph.

    calls = ProgramCalls("http://127.0.0.1:8000/v1", deadline_s=60, app="research")
    model = ChatOpenAI(..., http_client=calls.http_client(), http_async_client=calls.async_http_client())
    graph.invoke(..., config={"callbacks": [calls], "configurable": {"thread_id": "night run"}})

LangChain tells a callback of each call in the context in which the request is sent; the client's hook finds it there.
The program is named by the run, so two runs of one thread are two programs; a deadline belongs to each.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from uuid import UUID

import httpx
from langchain_core.callbacks import BaseCallbackHandler

from deployments.hooks import headers
from deployments.hooks.ending import Endings

_current: ContextVar[Mapping[str, str] | None] = ContextVar("tempo_langchain_call", default=None)


class ProgramCalls(BaseCallbackHandler):
    """Give it to a run as a callback, and its clients to the models.

    base_url: of the server, with `/v1`. deadline_s: for a whole run; None: no deadline. extra: more headers.
    """

    run_inline = True  # in the context of the call, also in asynchronous runs

    def __init__(
        self, base_url: str, *, deadline_s: float | None = None, app: str = "", extra: Mapping[str, str] | None = None
    ) -> None:
        self._endings = Endings(base_url, extra or {})
        self._deadline_s = deadline_s
        self._app = app
        self._extra = dict(extra or {})
        self._root_of: dict[UUID, UUID] = {}
        self._names: dict[UUID, str] = {}

    def close(self) -> None:
        """Wait until the ends of all runs are told."""
        self._endings.close()

    def http_client(self, **options: Any) -> httpx.Client:
        """For `http_client` of a model."""
        return headers.http_client(_sent, **options)

    def async_http_client(self, **options: Any) -> httpx.AsyncClient:
        """For `http_async_client` of a model."""
        return headers.async_http_client(_sent, **options)

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A run, or a node of one, begins."""
        self._root_of[run_id] = run_id if parent_run_id is None else self._root_of.get(parent_run_id, parent_run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """It has ended."""
        self._root_of.pop(run_id, None)
        name = self._names.pop(run_id, None)
        if name is not None:
            self._endings.finish(name)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """It has ended otherwise."""
        self._root_of.pop(run_id, None)
        name = self._names.pop(run_id, None)
        if name is not None:
            self._endings.cancel(name, type(error).__name__)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A call is about to be sent."""
        self._begin(run_id, parent_run_id, metadata or {})

    def on_llm_start(
        self,
        serialized: Any,
        prompts: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Likewise, of a model that completes text."""
        self._begin(run_id, parent_run_id, metadata or {})

    def _begin(self, run_id: UUID, parent_run_id: UUID | None, metadata: Mapping[str, Any]) -> None:
        root = self._root_of.get(parent_run_id, parent_run_id) if parent_run_id is not None else run_id
        thread = headers.clean(metadata.get("thread_id"))
        namespace = headers.clean(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns"))
        name = f"{thread} {root}".strip()
        if root in self._root_of:
            self._names[root] = name
        _current.set(
            {
                **self._extra,
                "x-tempo-program": name,
                "x-tempo-call": str(run_id),
                "x-tempo-stage": headers.clean(metadata.get("langgraph_node")),
                # A graph inside a node goes its own way; the node's own task id is not an agent.
                "x-tempo-agent": namespace.rpartition("|")[0],
                "x-tempo-app": self._app,
                "x-tempo-deadline-s": "" if self._deadline_s is None else str(self._deadline_s),
            }
        )


def _sent() -> Mapping[str, str]:
    return _current.get() or {}
