"""The optimiser, its update, and its state by parameter name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moewright.moe.router import Router
from moewright.optim.blockwise import BLOCK, PIECE, Blockwise
from moewright.optim.gradients import KeptGradients
from moewright.optim.rounding import generator_of, rounded
from moewright.parallel.experts import local_part
from moewright.parallel.memory import DeviceMemory, Memory, Places, expect
from moewright.parallel.parts import boxes_of, with_part

MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
MASTER: Final = "master"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the optimiser stores what it moves; it computes in float32 at least."""

    masters: Literal["float32", "stochastic"] = "float32"
    """Of parameters that are less than float32: a float32 copy that is moved in their place, or rounding by chance."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """float32 is float64 for parameters that are."""
    seed: int = 0
    """Of rounding by chance."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what is moved for parameters of this dtype, and of their gradients where these are kept."""
        return torch.promote_types(dtype, torch.float32) if self.masters == "float32" else dtype

    def state_bytes(self, dtype: torch.dtype, *, elsewhere: bool) -> float:
        """Bytes a parameter of moments and, if there is one, of its master; `elsewhere` than the parameter itself."""
        stored = self.stored_dtype(dtype)
        wide = {"float32": torch.promote_types(stored, torch.float32).itemsize, "bfloat16": 2, "int8": 1 + 4 / BLOCK}
        return 2 * wide[self.moments] + (stored.itemsize if elsewhere or stored != dtype else 0)

    def has_master(self, dtype: torch.dtype, *, device: torch.device, places: Places) -> bool:
        """Whether a copy is moved in the place of a parameter on this device: of another dtype, or elsewhere."""
        return _elsewhere(places, device) or self.stored_dtype(dtype) != dtype

    def gradient_memory(self, dtype: torch.dtype, *, device: torch.device, places: Places) -> Memory | None:
        """Where the gradient of such a parameter is kept for the update; None: it stays where autograd leaves it."""
        if places.gradients is None and self.has_master(dtype, device=device, places=places):
            return places.states or DeviceMemory(device)
        return places.gradients

    def bytes_outside(self, values: int, dtype: torch.dtype, *, device: torch.device, places: Places) -> int:
        """Bytes of a parameter's moments, master and gradient in the memory of `places`, which has one for states."""
        assert places.states is not None
        total = values * self.state_bytes(dtype, elsewhere=_elsewhere(places, device))
        if self.moments == "int8":
            total += 2 * 4 * (-values % BLOCK) / BLOCK  # scales of blocks that are not full
        if self.gradient_memory(dtype, device=device, places=places) is not None:
            total += values * self.stored_dtype(dtype).itemsize
        return round(total)


def _elsewhere(places: Places, device: torch.device) -> bool:
    return places.states is not None and places.states.device.type != device.type


Group = dict[str, Any]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, by its fused kernels, with states in other memory and in other precision than the parameters.

    `state` has for each parameter `step`, `exp_avg`, `exp_avg_sq` and, if there is one, `master`: tensors, divided as
    the parameter is, or `Blockwise` moments of the part that is here. With float32 states on the parameter's device or
    in files, the update is that of torch to the last bit.
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        betas: tuple[float, float],
        precision: Precision,
        places_of: Callable[[nn.Parameter], Places],
    ) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        self.precision, self.gradients = precision, KeptGradients()
        self._places = {p: places_of(p) for group in self.param_groups for p in group["params"]}
        self._numbers = {p: number for number, p in enumerate(self._places)}
        for parameter, places in self._places.items():
            memory = self.precision.gradient_memory(parameter.dtype, device=parameter.device, places=places)
            if memory is not None:
                self.gradients.keep(parameter, memory, self._stored_dtype(parameter))

    def _stored_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return self.precision.stored_dtype(parameter.dtype)

    def _has_master(self, parameter: nn.Parameter) -> bool:
        places = self._places[parameter]
        return self.precision.has_master(parameter.dtype, device=parameter.device, places=places)

    def master_of(self, parameter: nn.Parameter) -> Tensor | None:
        """What is moved in a parameter's place, divided as it is; made if need be. None: the parameter itself."""
        if MASTER not in self.state[parameter] and self._has_master(parameter):
            value = self._memory(parameter).empty(local_part(parameter).shape, self._stored_dtype(parameter))
            value.copy_(local_part(parameter.detach()))
            self.state[parameter][MASTER] = with_part(parameter.detach(), value)
        master: Tensor | None = self.state[parameter].get(MASTER)
        return master

    def _memory(self, parameter: nn.Parameter) -> Memory:
        return self._places[parameter].states or DeviceMemory(parameter.device)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, from zero if it has none."""
        state: dict[str, Any] = self.state[parameter]
        master = self.master_of(parameter)
        if "step" not in state:
            stored = local_part(parameter.detach() if master is None else master)
            state["step"] = torch.zeros((), device=stored.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = self._moment(parameter, name, stored)
        return state

    def begin(self) -> None:
        """Make the states of all parameters that have none."""
        for parameter in self._places:
            self._begin(parameter)

    def _moment(self, parameter: nn.Parameter, name: str, like: Tensor) -> Tensor | Blockwise:
        memory, precision = self._memory(parameter), self.precision.moments
        if isinstance(memory, DeviceMemory):
            memory = DeviceMemory(memory.device)  # moments never travel, and pinned memory is dear
        if precision == "int8":
            return Blockwise.zeros(tuple(like.shape), signed=name == "exp_avg", memory=memory)
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = memory.empty(like.shape, torch.bfloat16 if precision == "bfloat16" else wide).zero_()
        return with_part(parameter.detach(), zeros)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        self.gradients.arrive()
        for group in self.param_groups:
            moving = [p for p in group["params"] if self.gradients.of(p) is not None]
            # Those on their own device take one call of the kernel; others come one after the other.
            near = [p for p in moving if self._places[p].states is None and self._in_place(p)]
            self._step_in_place(near, group)
            far = [p for p in moving if p not in set(near)]
            for parameter, following in zip_longest(far, far[1:]):
                if following is not None:
                    expect(local_part(t) for t in self._begin(following).values() if isinstance(t, Tensor))
                if self._in_place(parameter):
                    self._step_in_place([parameter], group)
                else:
                    self._step_in_pieces(parameter, group)
            for parameter in moving:
                if (master := self.state[parameter].get(MASTER)) is not None:
                    local_part(parameter.detach()).copy_(local_part(master), non_blocking=True)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self.gradients.of(parameter)
        assert gradient is not None
        return local_part(gradient)

    def _in_place(self, parameter: nn.Parameter) -> bool:
        """Whether all is stored as it is computed with."""
        wide = torch.promote_types(self._stored_dtype(parameter), torch.float32)
        return self._stored_dtype(parameter) == wide and self.precision.moments == "float32"

    def _step_in_place(self, parameters: list[nn.Parameter], group: Group) -> None:
        if parameters:
            states = [self._begin(parameter) for parameter in parameters]
            stored = [local_part(s.get(MASTER, p)).detach() for p, s in zip(parameters, states, strict=True)]
            steps, first, second = ([local_part(state[name]) for state in states] for name in MOMENTS)
            _apply(stored, [self._gradient(parameter) for parameter in parameters], first, second, steps, group)

    def _step_in_pieces(self, parameter: nn.Parameter, group: Group) -> None:
        state = self._begin(parameter)
        stored = local_part(state.get(MASTER, parameter)).detach().view(-1)
        gradient = self._gradient(parameter).reshape(-1)
        moments = [_Pieces(state[name]) for name in ("exp_avg", "exp_avg_sq")]
        rounds = torch.promote_types(stored.dtype, torch.float32) != stored.dtype
        starts = [held.start for box in boxes_of(parameter)[:1] for held in box.whole]
        place = (int(state["step"]), self._numbers[parameter], starts)
        by_chance = rounds or self.precision.moments == "int8"
        generator = generator_of(self.precision.seed, *place, device=stored.device) if by_chance else None
        for first in range(0, len(stored), PIECE):
            piece = slice(first, first + PIECE)
            values = stored[piece].float() if rounds else stored[piece]
            now = [moment.read(piece).to(values.dtype) for moment in moments]
            _apply([values], [gradient[piece].to(values)], now[:1], now[1:], [state["step"].clone()], group)
            for moment, value in zip(moments, now, strict=True):
                moment.write(piece, value, generator)
            if rounds and generator is not None:
                stored[piece] = rounded(values, generator)
        state["step"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.gradients.drop()


class _Pieces:
    """A moment as flat float32 values, whatever it is stored in."""

    def __init__(self, moment: Tensor | Blockwise) -> None:
        self.moment = moment if isinstance(moment, Blockwise) else local_part(moment).view(-1)

    def read(self, piece: slice) -> Tensor:
        return self.moment.read(piece) if isinstance(self.moment, Blockwise) else self.moment[piece]

    def write(self, piece: slice, values: Tensor, generator: torch.Generator | None) -> None:
        if isinstance(self.moment, Blockwise):
            self.moment.write(piece, values, generator)
        elif self.moment[piece].data_ptr() != values.data_ptr():
            self.moment[piece] = values


def _apply(
    stored: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: Group,
) -> None:
    beta1, beta2 = group["betas"]
    names = ("lr", "weight_decay", "eps", "amsgrad", "maximize")
    options = {name: group[name] for name in names} | {"beta1": beta1, "beta2": beta2}
    adamw(stored, gradients, first, second, [], steps, fused=True, **options)


def make_optimizer(
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    router_ratio: float = 1.0,
    precision: Precision | None = None,
    places_of: Callable[[nn.Parameter], Places] = lambda parameter: Places(),
) -> AdamW:
    """AdamW over all parameters, decay on matrices only (not on norms and biases).

    Each group has a `ratio` of its learning rate to the step's: `router_ratio` for the routers of MoELayers, else 1.
    """
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.dim() < 2 or name.endswith("bias") else weight_decay
            ratio = router_ratio if id(parameter) in routers else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    options = [{"params": group, "weight_decay": decay, "ratio": ratio} for (decay, ratio), group in groups.items()]
    return AdamW(options, betas=betas, precision=precision or Precision(), places_of=places_of)


def begin_backward(optimizer: torch.optim.Optimizer, *, last: bool) -> None:
    """Before the backward pass of a micro-batch: gradients for another device leave in the `last` one of a step."""
    if isinstance(optimizer, AdamW):
        optimizer.gradients.last = last


def gradients(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of a step before its update, wherever they lie; of parameters that have one."""
    if not isinstance(optimizer, AdamW):
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer.gradients.arrive()
    found = (optimizer.gradients.of(parameter) for parameter in parameters)
    return [gradient for gradient in found if gradient is not None]


def update(optimizer: torch.optim.Optimizer, *, learning_rate: float) -> None:
    """Apply the gradients at the step's learning rate, and drop them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def masters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By the names of their parameters the tensors that are moved in their place: a state holds these, and no others.

    So a state in float32 goes on with parameters in bfloat16 and masters, and the other way round. Whoever fills them
    calls `follow_masters` then.
    """
    if not isinstance(optimizer, AdamW):
        return {}
    found = {name: optimizer.master_of(parameter) for name, parameter in model.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def follow_masters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set each parameter to the value of what is moved in its place."""
    tensors = masters(model, optimizer)
    for name, parameter in model.named_parameters():
        if name in tensors:
            local_part(parameter).copy_(local_part(tensors[name]))


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | Blockwise]:
    """The optimiser's tensors as `{"exp_avg.<parameter name>": tensor, ...}`, as they are stored, without copies."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


@torch.no_grad()
def set_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor | Blockwise]]
) -> None:
    """Take over the items of `moments`, one after the other; a parameter has all of its tensors, or none.

    They are stored as the optimiser stores them, whatever they were in the state that they come from.
    """
    assert isinstance(optimizer, AdamW)
    parameters = dict(model.named_parameters())
    for key, value in tensors:
        moment, _, name = key.partition(".")
        kept = optimizer._begin(parameters[name])[moment]
        part = value.whole() if isinstance(value, Blockwise) else local_part(value)
        if isinstance(kept, Blockwise):
            kept.write(slice(0, len(kept.codes_N)), part.to(kept.scales_B).reshape(-1))
        else:
            local_part(kept).copy_(part)
        del value, part  # before the next one is read
