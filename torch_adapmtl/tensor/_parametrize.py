"""Attaching a parametrization to a tensor so that its module can still be copied and pickled.

This module uses `torch.nn.utils.parametrize` and removes three of its limits:

- a parametrized module cannot be pickled;
- a deep copy shares the generated class with its source, so that removing the parametrization
  from one of the two breaks the other;
- recurrent modules read their weights from a list that ignores the parametrization.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["attach", "detach"]


def attach(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Make `module.<name>` the output of `parametrization`; the parameter keeps its identity."""
    order = _order(module)
    if parametrize.is_parametrized(module, name):
        # Placed first, on the parameter itself; other parametrizations are applied after it.
        parametrization.train(module.training)
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        chain.insert(0, parametrization)
    else:
        # `unsafe` skips a check of shape and dtype, which a soft threshold never changes.
        parameters, modules = dict(module._parameters), dict(module._modules)
        parameter = parameters.get(name)
        if parameter is not None:
            # Registering calls `set_` on the tensor. A DistributedDataParallel that already wraps
            # the model would lose the parameter, so register another one and replace it below.
            module._parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        try:
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
        except Exception:  # torch has taken the parameter away before it derives the class
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(modules)
            raise
        if parameter is not None:
            plain: Any = module.parametrizations[name]  # type: ignore[index]
            plain._parameters["original"] = parameter
    plist: Any = module.parametrizations[name]  # type: ignore[index]
    plist.order = order
    _mend_class(type(module))


def _order(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's parameters in their original order, with the parametrized ones."""
    known: tuple[str, ...] = ()
    if parametrize.is_parametrized(module):
        plists: Any = module.parametrizations
        known = max((getattr(plist, "order", ()) for plist in plists.values()), key=len)
    return known + tuple(name for name in module._parameters if name not in known)


def detach(module: nn.Module, name: str) -> nn.Parameter:
    """Undo `attach`: restore the parameter at `module.<name>`, in its original position."""
    parametrizations: Any = module.parametrizations
    plist = parametrizations[name]
    parameter: nn.Parameter = plist.original
    if len(plist) > 1:
        del plist[0]  # other parametrizations stay
        return parameter
    del parametrizations[name]
    cls: Any = type(module)
    if len(parametrizations) == 0:
        del module.parametrizations
        module.__class__ = cls.__bases__[0]
    else:
        # A new class, because a copy of the module may share this one.
        members = {k: v for k, v in vars(cls).items() if k not in (name, "__dict__", "__weakref__")}
        module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)
    setattr(module, name, parameter)
    followers = set(plist.order[plist.order.index(name) + 1 :])
    later = [k for k in module._parameters if k in followers]
    for key in later:
        module._parameters[key] = module._parameters.pop(key)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return parameter


def _mend_class(cls: Any) -> None:
    if "__reduce_ex__" in vars(cls):
        return
    cls.__reduce_ex__ = _reduce_ex
    if "__deepcopy__" in vars(cls):  # shares the class; without it, __reduce_ex__ is used
        del cls.__deepcopy__
    if "__getstate__" in vars(cls):  # torch's method, which raises an error
        del cls.__getstate__
    if issubclass(cls, nn.RNNBase):
        cls._flat_weights = property(_flat_weights, _ignore)
        cls.flatten_parameters = cls._update_flat_weights = _nothing


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    getstate = getattr(base, "__getstate__", None)  # from Python 3.11 on, every object has one
    state = self.__dict__ if getstate is None else getstate(self)
    return _shell, (base, tuple(self.parametrizations)), state


def _shell(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty module of a fresh parametrized class, to be filled by `__setstate__`."""
    shell = base.__new__(base)
    nn.Module.__init__(shell)
    for name in names:
        shell._parameters[name] = nn.Parameter()
        parametrize.register_parametrization(shell, name, nn.Identity(), unsafe=True)
    _mend_class(type(shell))
    return shell


def _flat_weights(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self: Any, value: list[Tensor | None]) -> None:
    """Ignore the list that `nn.RNNBase` assigns when it is moved; the list is computed instead."""


def _nothing(self: Any) -> None:
    """Do nothing: computed weights share no storage that cuDNN could flatten."""
