"""The models of a server by name, each with its worker, and the adapters upon them."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llama2.checkpoint import store
from llama2.checkpoint.adapter import read_adapter
from llama2.errors import RequestError, did_you_mean
from llama2.infer.engine import Engine
from llama2.llm import LLM, load
from llama2.model.lora import detach, set_active
from llama2.serve.config import ServeConfig
from llama2.serve.refusal import Refusal
from llama2.serve.worker import Worker

log = logging.getLogger("llama2.serve")


def is_split() -> bool:
    """Return whether torchrun started several processes: then each holds a part of the model."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass
class Served:
    """A model, and its adapters: name -> folder."""

    worker: Worker
    source: str
    adapters: dict[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Return what changes when answers may: the weights' source, shape and precision."""
        llm = self.worker.loaded()
        told = f"{self.source} {llm.config} {llm.model.tok_embeddings.weight.dtype}"
        return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:10]


class Models:
    """Finds a model by the name that a client gives."""

    def __init__(self, config: ServeConfig):
        """Raises RequestError for names that are not clear."""
        self.config = config
        self.served: dict[str, Served] = {}
        for source in config.models:
            name, path = named(source)
            if name in self.served:
                raise RequestError(f"two models are called {name!r}; name them, e.g. first={path}")
            room = config.max_batch + config.max_waiting
            open_llm = self._opener(name, path, is_first=not self.served)
            worker = Worker(name, open_llm, open_engine=self._open_engine, room=room)
            self.served[name] = Served(worker, path)
        for given in config.adapter:
            name, separator, path = given.partition("=")
            model, _, name = name.rpartition("/")
            if not (separator and name and path):
                raise RequestError(f"--adapter {given} must be NAME=FOLDER")
            if model and model not in self.served:
                raise RequestError(
                    f"--adapter {given} is for the model {model!r}{did_you_mean(model, self.served)}; there is "
                    f"{', '.join(self.served)}"
                )
            self._model(model or None).adapters[name] = path
        names = [name for each in self.served.values() for name in each.adapters] + list(self.served)
        if len(names) != len(set(names)):
            raise RequestError(f"the names {', '.join(names)} must all differ")

    def _opener(self, name: str, path: str, *, is_first: bool) -> Callable[[], LLM]:
        config = self.config

        def open_llm() -> LLM:
            llm = load(
                path,
                dtype=config.dtype,
                device=config.device,
                tokenizer=config.tokenizer if is_first else None,
                max_batch=config.max_batch,
                chat_format=config.chat_format,
                draft=config.draft if is_first else None,
                split=is_split(),
            )
            for adapter, folder in self.served[name].adapters.items():
                _put_on(llm, adapter, folder)
            return llm

        return open_llm

    def _open_engine(self, llm: LLM) -> Engine:
        config = self.config
        return llm.engine(
            max_step_tokens=config.max_step_tokens,
            cache_tokens=config.cache_tokens,
            prefix_cache=config.prefix_cache,
        )

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Load all models; to be called in the event loop."""
        loop = asyncio.get_running_loop()
        for served in self.served.values():
            worker = served.worker

            def ready(worker: Worker = worker) -> None:
                if worker.failure is not None:
                    on_failure(worker.failure)
                else:
                    log.info("%s is ready", worker.name)

            worker.start(loop, ready)

    def stop(self) -> None:
        for served in self.served.values():
            served.worker.stop()

    @property
    def workers(self) -> list[Worker]:
        return [served.worker for served in self.served.values()]

    def find(self, name: str | None) -> tuple[Served, str | None]:
        """Return a model and the adapter meant, if the name is an adapter's. Raises Refusal: 404."""
        for served in self.served.values():
            if name in served.adapters:
                return served, name
        return self._model(name), None

    def _model(self, name: str | None) -> Served:
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            known = [*self.served, *(each for served in self.served.values() for each in served.adapters)]
            raise Refusal(
                404,
                f"the model {name!r} does not exist{did_you_mean(name, known)}; there is {', '.join(known)}",
                param="model",
                code="model_not_found",
            )
        return self.served[name]

    def listing(self) -> list[dict[str, object]]:
        """Return OpenAI's model objects; those still being loaded have no length yet."""
        found: list[dict[str, object]] = []
        for name, served in self.served.items():
            llm = served.worker.llm
            length = None if llm is None else llm.config.context_length
            same = {"object": "model", "created": served.created, "owned_by": "llama2", "max_model_len": length}
            found.append({"id": name, **same, "root": name, "parent": None})
            found += [{"id": adapter, **same, "root": adapter, "parent": name} for adapter in served.adapters]
        return found

    async def load_adapter(self, model: str | None, name: str, folder: str) -> None:
        """Put an adapter upon a model that is at work. Raises Refusal and Llama2Error."""
        served = self._model(model)
        if any(name in each.adapters or name in self.served for each in self.served.values()):
            raise Refusal(400, f"the name {name!r} is taken; unload that adapter first", param="lora_name")
        await served.worker.change(lambda llm: _put_on(llm, name, folder))
        served.adapters[name] = folder

    async def unload_adapter(self, name: str) -> None:
        served, adapter = self.find(name)
        if adapter is None:
            raise Refusal(404, f"there is no adapter {name!r}", param="lora_name", code="model_not_found")
        del served.adapters[name]
        await served.worker.change(lambda llm: detach(llm.model, name))


def named(source: str) -> tuple[str, str]:
    """Return name and place of a model given as PATH or NAME=PATH.

    A hub name is its own name; a path goes by its last part.
    """
    name, separator, path = source.partition("=")
    if separator and name and path and not Path(source).exists():
        return name, path
    place = Path(source)
    is_local = place.exists() or place.is_absolute() or source.startswith(".")
    return (place.resolve().name if is_local else source), source


def _put_on(llm: LLM, name: str, folder: str) -> None:
    """Put an adapter on, switched off. Raises Llama2Error for one that would change the base itself."""
    adapter = read_adapter(folder, model=llm.config, name=name)
    whole = adapter.config.trained_modules
    if whole or adapter.vocab_size != llm.config.vocab_size:
        raise RequestError(
            f"adapter {name!r} replaces {', '.join(whole) or 'the vocabulary'} of its base, so requests without it "
            "would change too; serve it as a model of its own"
        )
    store.put_on(llm.model, folder, name=name)
    set_active(llm.model, ())
