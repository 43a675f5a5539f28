"""Options of the transfer that every experiment has, and the methods that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import merge_jax as mj
from merge_jax.checks import check_at_least_one, check_below_one
from merge_jax.study.choices import OutputForm
from merge_jax.study.config import RunConfig, Schedule

if TYPE_CHECKING:
    import optax

    from merge_jax.study.alignment import Alignment
    from merge_jax.study.scenario import Learner, Method, Reader
    from merge_jax.types import ModelApply, TeacherFn

    Routes = Sequence[mj.Route]
    # Makes a transfer of a factory: for the routes at hand, from one source, from several, or inside one model.
    Bind = Callable[[Callable[[Routes], mj.Transfer]], mj.Transfer]

__all__ = ["Objective", "TransferConfig", "parse_pairs", "parse_routes"]


class Objective(NamedTuple):
    """What a target learns, and what of the source it is shown for it."""

    task: mj.Task
    teacher: TeacherFn | None = None


@dataclass(frozen=True, kw_only=True)
class TransferConfig(RunConfig):
    """Options of the transfer."""

    stop: float = 0.1
    """Fraction of the run after which share and mergenet leave the target to itself."""
    output: OutputForm = "warm"
    """How the adapter's output becomes the target's: see lpka_transfer."""
    num_layers: int = 1
    """Layers of each route's LPKA."""
    num_heads: int = 8
    """Heads of each attention."""
    capped: bool = True
    """Cap the widths of the LPKA as lpka_transfer does; without, they are the published ones."""
    attention_dropout: float = 0.1
    """Dropout on the attention weights of each LPKA."""
    feed_forward_dropout: float = 0.2
    """Dropout on the feed-forward block of each LPKA."""
    adapter_learning_rate: float = 1e-2
    """Learning rate of the adapter's AdamW."""
    adapter_schedule: Literal["constant", "cosine"] = "constant"
    """Course of that rate; cosine falls to 0 after the first 2 percent of the run, as published."""
    agree: tuple[str, ...] = ()
    """Layers whose features are to agree, as target=source, in the methods with agree in their names; see
    merge_jax.agreeing."""
    agreement: float = 20.0
    """Weight of their disagreement in the target's loss."""
    view: Literal["mixed", "plain"] = "mixed"
    """What they are compared on: images between those of the batch (text as it is), or the batch itself."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        check_at_least_one(num_layers=self.num_layers, num_heads=self.num_heads)
        check_below_one(attention_dropout=self.attention_dropout, feed_forward_dropout=self.feed_forward_dropout)
        if not 0 < self.adapter_learning_rate < float("inf"):
            raise ValueError(f"adapter_learning_rate must be above 0, got {self.adapter_learning_rate}")
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must be a fraction in [0, 1], got {self.stop}")
        if not 0 <= self.agreement < float("inf"):
            raise ValueError(f"agreement must be 0 or more, got {self.agreement}")
        parse_pairs(self.agree, "a pair of layers", "stage1_0=stage1_0")

    def lpka(self, routes: Any, *, output: OutputForm | None = None) -> mj.Transfer:
        """Returns the transfer of these options, maybe in another output form."""
        return mj.lpka_transfer(
            routes,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            output=output or self.output,
            attention_dropout=self.attention_dropout,
            feed_forward_dropout=self.feed_forward_dropout,
            max_width=512 if self.capped else None,
            max_hidden=1024 if self.capped else None,
        )

    def methods_of(
        self,
        bind: Bind,
        num_steps: int,
        objectives: Mapping[str, Callable[[], Objective]],
        alignment: Alignment | None = None,
    ) -> dict[str, Callable[[], Method]]:
        """Returns what makes each method: every transfer with every objective.

        Args:
          bind: makes a transfer of a factory; see `Bind`.
          num_steps: of the run.
          objectives: by name, as the methods have them; `""` is the target's own task. A method is named after its
            transfer and its objective (`share_agree`), and after one of the two where the other is none (`share`,
            `agree`); `vanilla` has neither.
          alignment: the models, where their channels can be aligned.
        """
        from merge_jax.study.scenario import Method

        def method(transfer: Callable[[Routes], mj.Transfer] | None, objective: Callable[[], Objective]) -> Method:
            task, teacher = objective()
            if transfer is None:
                return Method(task, teacher=teacher)
            return Method(task, bind(transfer), self.stop, teacher)

        def aligned(learning: bool, objective: Callable[[], Objective]) -> Method:
            if alignment is None or (transfer := bind(alignment.transfer)).fit is None:
                raise ValueError("a method with aligned needs one source that is a model of its own")
            task, teacher = objective()
            if not learning:
                return Method(task, transfer, 1 / num_steps, teacher, alignment.fit(transfer))
            residual = bind(lambda routes: self.lpka(routes, output="residual"))
            both = mj.chain(alignment.first(transfer), residual)
            return Method(task, both, self.stop, teacher, alignment.fit(transfer, lambda all_, own: {**all_, "0": own}))

        methods = {}
        for (name, transfer), (of, objective) in product(self._factories().items(), objectives.items()):
            full_name = "_".join(part for part in (name, of) if part) or "vanilla"
            methods[full_name] = partial(method, transfer, objective)
        for (name, learning), (of, objective) in product(
            {"aligned": False, "mergenet_aligned": True}.items(), objectives.items()
        ):
            methods["_".join(part for part in (name, of) if part)] = partial(aligned, learning, objective)
        return methods

    def _factories(self) -> dict[str, Callable[[Routes], mj.Transfer] | None]:
        """Returns the transfers by name: factories of a transfer of routes; `""` is none."""

        def lpka(output: OutputForm | None = None) -> Callable[[Routes], mj.Transfer]:
            return lambda routes: self.lpka(routes, output=output)

        def itself(routes: Routes) -> mj.Transfer:
            routes = [replace(route, source=route.target) for route in routes]
            return mj.self_transfer(lpka("residual")(routes))

        return {
            "": None,
            "share": mj.share_transfer,
            "mergenet": lpka(),
            "mergenet_official": lpka("published"),
            "mergenet_residual": lpka("residual"),
            "mergenet_warm": lpka("warm"),
            "selection": mj.weight_selection_transfer,
            "linear_operators": mj.linear_operator_transfer,
            "generator": mj.parameter_generator_transfer,
            "transport": mj.optimal_transport_transfer,
            # Controls: as many parameters as mergenet's, which read nothing, or the target itself.
            "no_source": lambda routes: mj.without_source(lpka("residual")(routes)),
            "itself": itself,
        }

    def objectives_of(
        self, source: Learner | None, target: Learner, optimizer: optax.GradientTransformation
    ) -> dict[str, Callable[[], Objective]]:
        """Returns the objectives of any task: its own, `""`, and `agree`, with its features drawn to the source's."""
        reader = target.reader
        assert reader is not None  # Several models in one only give.

        def agree() -> Objective:
            of_source = None if source is None else source.reader
            return self.agreeing(of_source, reader.apply, lambda apply: mj.Task(reader.loss(apply), optimizer))

        return {"": lambda: Objective(mj.Task(target.loss_fn, optimizer)), "agree": agree}

    def agreeing(
        self,
        source: Reader | None,
        apply: ModelApply,
        task: Callable[[ModelApply], mj.Task],
        teacher: TeacherFn | None = None,
    ) -> Objective:
        """Returns an objective with the target's features drawn to the source's.

        Args:
          source: the model that gives.
          apply: the target's apply function.
          task: makes a task of the target of its apply function.
          teacher: what else the target is shown of the source.

        Raises:
          ValueError: no layers that could agree, or a source that cannot be looked into.
        """
        if source is None:
            raise ValueError("a method with agree needs one source that is a model of its own")
        if not self.agree:
            raise ValueError("a method with agree needs layers: --agree target=source, such as stage1_0=stage1_0")
        target_layers, source_layers = zip(
            *parse_pairs(self.agree, "a pair of layers", "stage1_0=stage1_0"), strict=True
        )
        view = partial(mj.mixed, axis_name=self.axis_name) if self.view == "mixed" else None
        of_features = mj.features_teacher(source.apply, source_layers, inputs=source.inputs, view=view)

        def both(params: Any, model_state: Any, batch: Any) -> Any:
            batch = of_features(params, model_state, batch)
            return batch if teacher is None else teacher(params, model_state, batch)

        return Objective(
            task(mj.agreeing(apply, target_layers, weight=self.agreement, view=view, axis_name=self.axis_name)), both
        )

    def adapter_optimizer(self, schedule: Schedule) -> optax.GradientTransformation:
        """Returns the adapter's AdamW; its rate goes by the number of its own updates, one a transfer."""
        import optax

        rate: optax.ScalarOrSchedule = self.adapter_learning_rate
        if self.adapter_schedule == "cosine":
            steps = schedule.target.steps
            updates = max(2, mj.TransferSteps(self.cycle, self.stop, steps).count())
            held = max(1, round(0.02 * updates))
            falling = optax.cosine_decay_schedule(rate, updates - held)
            rate = optax.join_schedules([optax.constant_schedule(rate), falling], [held])
        return mj.adapter_adamw(rate)


def parse_routes(words: Iterable[str]) -> list[mj.Route]:
    """Returns the routes that are given as `target=source`, each path or pattern as `merge_jax.Route` has it.

    Paths that both end in `attention` are blocks of attention, which move head by head.

    Raises:
      ValueError: a word that is no such pair.
    """
    routes = []
    for target, source in parse_pairs(words, "a route", "fc/kernel=fc/kernel"):
        blocks = target.endswith("attention") and source.endswith("attention")
        routes.append(mj.Route(target, source, view="attention" if blocks else None))
    return routes


def parse_pairs(words: Iterable[str], noun: str, example: str) -> list[tuple[str, str]]:
    """Returns the two sides of each word.

    Raises:
      ValueError: a word that is no `target=source`.
    """
    pairs = []
    for word in words:
        target, equals, source = word.partition("=")
        if not (target and equals and source):
            raise ValueError(f"{noun} must be target=source, such as {example}, got {word!r}")
        pairs.append((target, source))
    return pairs
