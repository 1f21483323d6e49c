"""What this program asks of Ray: the one module that imports it, once it is needed.

Ray places, watches and restarts actors. What the actors hold is in replica.py and directory.py.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitlearn.config import RayConfig
from splitlearn.errors import InputError, SetupError

LOCAL = "local"
"""The address of a Ray that is started for this program, and ends with it."""
_CLASS = re.compile(r"^[\w.]+: ")
"""Of an exception, before its message in a traceback."""
OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing but small messages is kept there


@dataclass(frozen=True)
class Lost:
    """An actor could not answer. `dead`: Ray will not start it again. `why`: the last line of what Ray says."""

    dead: bool
    why: str = ""


class Ray:
    """A connection to Ray at `address`, or a Ray of this program's own. Its actors end with the connection."""

    def __init__(self, address: str, settings: RayConfig) -> None:
        import ray
        from ray import exceptions, util
        from ray.util import scheduling_strategies

        self._ray, self._exceptions, self._util, self._strategies = ray, exceptions, util, scheduling_strategies
        self._settings, self.local = settings, address == LOCAL
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by a Ray that is started here
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if self.local else {}
        options = {"namespace": settings.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=address, **options, **own)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            said = str(error).strip().splitlines() or ["no message"]
            ask = "" if self.local else " If the cluster asks for a token, set RAY_AUTH_MODE=token (docs/ray.md)."
            raise SetupError(f"--ray: {address!r} cannot be used: {said[0]}{ask}") from error

    def close(self) -> None:
        """End the actors, and a Ray of this program's own."""
        self._ray.shutdown()

    @property
    def here(self) -> str:
        """This node's IP address."""
        return node_address()

    def nodes(self) -> list[dict[str, float]]:
        """The resources of each node that is alive."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one replica."""
        ours = self._settings
        wanted = {"CPU": ours.num_cpus, "GPU": ours.num_gpus, "memory": float(ours.memory or 0)}
        return {name: amount for name, amount in wanted.items() if amount}

    def group(self, count: int) -> Any:
        """A placement group for `count` replicas: each on a node of its own where there are enough, else spread as far
        as they go. It may be placed later, when there is room."""
        bundle = self.bundle()
        able = sum(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in self.nodes())
        strategy = "STRICT_SPREAD" if able >= count else "SPREAD"
        return self._util.placement_group([bundle] * count, strategy=strategy)

    def placed(self, group: Any, within_s: float) -> bool:
        """Whether there is room for `group`, or will be within that time."""
        return bool(group.wait(within_s))

    def remove(self, group: Any) -> None:
        """Give the room of `group` back."""
        self._util.remove_placement_group(group)

    def replica(self, kind: type, name: str, group: Any, at: int, *arguments: object) -> Any:
        """Start an actor in place number `at` of `group`. Ray restarts it whenever its process ends."""
        ours = self._settings
        strategy = self._strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=at)
        needs = {"num_cpus": ours.num_cpus, "num_gpus": ours.num_gpus, "memory": ours.memory}
        return self._actor(kind, name, strategy, needs, *arguments)

    def beside(self, kind: type, name: str, *arguments: object) -> Any:
        """Start an actor on this node, which needs next to nothing. Ray restarts it whenever its process ends."""
        node = self._ray.get_runtime_context().get_node_id()
        strategy = self._strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        return self._actor(kind, name, strategy, {"num_cpus": 0}, *arguments)

    def call(self, actor: Any, method: str, *arguments: object) -> Any:
        """Call a method of an actor, without waiting. The result is for `answered` and `result`."""
        return getattr(actor, method).remote(*arguments)

    def answered(self, calls: Sequence[Any], within_s: float) -> list[Any]:
        """Those of `calls` that have an answer within that time."""
        done, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=within_s)
        return list(done)

    def result(self, call: Any) -> Any:
        """The answer to a call, or Lost. Raises what the method raised."""
        try:
            return self._ray.get(call)
        except self._exceptions.ActorUnavailableError:
            return Lost(dead=False)
        except self._exceptions.RayActorError as error:
            said = str(error).strip().splitlines() or [""]
            return Lost(dead=True, why=_CLASS.sub("", said[-1]))

    def kill(self, actor: Any) -> None:
        """End an actor for good."""
        self._ray.kill(actor, no_restart=True)

    def _actor(self, kind: type, name: str, strategy: Any, needs: dict[str, Any], *arguments: object) -> Any:
        options = {"name": name, "max_restarts": -1, "scheduling_strategy": strategy, **needs}
        try:
            return self._ray.remote(kind).options(**options).remote(*arguments)
        except ValueError as error:  # the name is taken
            wanted = "one that no other serve-trunk on this cluster has"
            raise InputError("ray.namespace", self._settings.namespace, wanted) from error


def node_address() -> str:
    """The IP address of this process's node."""
    import ray

    return str(ray.util.get_node_ip_address())
