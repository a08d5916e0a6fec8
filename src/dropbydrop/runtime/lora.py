"""LoRA adapters on a view: train with peft on top of codes that stay as they are.

    view = dropbydrop.view(model, 2)
    adapted = peft.get_peft_model(view, lora.adapt(peft.LoraConfig(r=8, target_modules=["o_proj"])))

    y = W_P x + (alpha / r) B A x        (LoRA, Hu et al. 2021), W_P decoded from P planes

peft replaces the modules that it adapts, so give it a view of its own. Without `adapt`, peft
refuses `NestedLinear` by name. Adapters cannot be merged into codes, and variants and initial
values that look at W or change it (DoRA, PiSSA, ...) are refused. To merge, call
`model.dequantize()` before peft, or export the level (`dropbydrop export`) and train on that.

peft is optional and imported only here; tested with 0.21.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NoReturn

from torch import nn

from dropbydrop.system.errors import DropError

from .modules import NestedLinear

_INITIAL = (True, False, "gaussian")  # initial values that do not depend on W


def adapt(config: Any) -> Any:
    """Make a `peft.LoraConfig` work for `NestedLinear`; changes and returns `config`.

    The same for an adapter read back from disk:
    `PeftModel.from_pretrained(view, folder, config=adapt(LoraConfig.from_pretrained(folder)))`.

    Raises:
        DropError: peft is not installed, or the config asks for what needs a dense weight.
    """
    if getattr(config, "use_dora", False) or config.init_lora_weights not in _INITIAL:
        asked = "use_dora" if getattr(config, "use_dora", False) else config.init_lora_weights
        raise DropError(
            f"LoRA with {asked!r} needs the dense weight, which a view does not have; use plain "
            "adapters (init_lora_weights True or 'gaussian'), or train on a folder made with "
            "dropbydrop export."
        )
    config._register_custom_module({NestedLinear: _adapter_class()})
    return config


@lru_cache(maxsize=1)
def _adapter_class() -> type:
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError as error:
        raise DropError("LoRA needs the peft package: pip install peft") from error

    class NestedLora(Linear):
        """peft's LoRA linear over a `NestedLinear`, which has no dense weight to merge into."""

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None}

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            assert isinstance(module, NestedLinear)
            return module.in_features, module.out_features

        def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise DropError(
                "adapters cannot be merged into the codes of a dropbydrop checkpoint; call "
                "model.dequantize() before adding them, or train on a folder made with "
                "dropbydrop export."
            )

    return NestedLora
