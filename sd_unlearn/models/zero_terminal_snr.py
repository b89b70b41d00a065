"""Zero terminal SNR: a schedule that ends in pure noise (Lin et al. 2023), for bases that predict v."""

from __future__ import annotations

from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import Base
from sd_unlearn.models.source import Source


def check_zero_terminal_snr(source: Source) -> None:
    """Refuse --zero_terminal_snr for an epsilon model before it loads, if its configuration is local.

    Raises:
        UsageError: the model does not predict v.
    """
    if source.known_prediction_type:  # not known for a Hub id
        _refuse_unless_v(source.name, source.known_prediction_type)


def use_zero_terminal_snr(base: Base) -> None:
    """Rescale the base's schedule to end in pure noise, and sample from there (Lin et al. 2023, sections 3.1 and 3.3).

    Raises:
        UsageError: the base does not predict v. For pure noise, x_t is eps, so an epsilon prediction is trivial.
    """
    from diffusers import DDIMScheduler

    _refuse_unless_v(base.name, base.prediction_type)
    base.pipeline.scheduler = DDIMScheduler.from_config(
        base.pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def _refuse_unless_v(name: str, prediction_type: str) -> None:
    if prediction_type != "v_prediction":
        raise UsageError(
            f"--zero_terminal_snr needs a base that predicts v (SD 2.x at 768 pixels); {name} predicts "
            f"{prediction_type}, which carries no information at pure noise. Leave the option out."
        )
