"""Settings of the autoscaler: which are refused, and the rules and the profile that they name."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.scheduler.autoscaling import A, E, Rules
from shared.config import SchedulerConfig
from shared.errors import ConfigError
from shared.models.source import open_source
from shared.planning.fit import Fitted
from shared.planning.fitted_file import BadProfile, load_fitted
from shared.planning.routing import Routing, recorded
from shared.planning.setting import Slo
from shared.traces.records import BadTrace

LEAST_WINDOW_S = 2.0


@dataclass(frozen=True)
class Profile:
    """What `moemesh profile` has measured of a model."""

    fitted: Fitted
    routing: Routing
    digest: str
    """Of the model."""


def autoscaling_by(config: SchedulerConfig) -> tuple[Rules, Profile] | None:
    """What autoscaling goes by; None: it is off. Raises ConfigError, and ModelError for an unusable model."""
    if config.autoscale == "off":
        return None
    check_autoscaling(config)
    profile = read_profile(config.profile, config.model)
    return rules_of(config, profile.fitted), profile


def read_profile(file: str, model: str) -> Profile:
    """A profile and the trace beside it. Raises ConfigError, and ModelError for a model that cannot be opened."""
    if not file:
        raise ConfigError("--profile", "autoscaling plans by a profile: make one with `moemesh profile --out FILE`")
    path, source = Path(file), open_source(model)
    trace = path.with_suffix(".trace")
    try:
        fitted, points = load_fitted(path, source.digest)
        most = max((point.batch for point in points), default=None)
        return Profile(fitted, recorded(trace, fitted.sizes.experts, fitted.sizes.top_k, most), source.digest)
    except (BadProfile, BadTrace) as error:
        raise ConfigError("--profile", str(error)) from error
    except OSError as error:
        raise ConfigError("--profile", f"{trace}: {error.strerror}; it belongs beside the profile") from error


def rules_of(config: SchedulerConfig, fitted: Fitted) -> Rules:
    """What the settings ask for, within what was measured. Raises ConfigError."""
    measured = {A: fitted.most_attention, E: fitted.most_experts}
    least = {A: config.autoscale_min_attention, E: config.autoscale_min_experts}
    most = {A: config.autoscale_max_attention or measured[A], E: config.autoscale_max_experts or measured[E]}
    for pool, count in most.items():
        if count > measured[pool]:
            known = f"the profile was measured with {measured[pool]} at most: profile more, or ask for fewer"
            raise ConfigError(f"--autoscale-max-{pool}", f"{count} instances, but {known}")
        if least[pool] > count:
            raise ConfigError(f"--autoscale-min-{pool}", f"{least[pool]} instances are more than the most, {count}")
    slo = Slo(config.slo_tpot_ms / 1e3, config.slo_ttft_ms / 1e3 or np.inf)
    return Rules(least, most, slo, config.autoscale_window_s, config.autoscale_cooldown_s, config.autoscale_idle_s)


def check_autoscaling(config: SchedulerConfig) -> None:
    """Raises ConfigError for settings out of range, or that are missing."""
    if config.autoscale == "on" and config.actuator == "none":
        raise ConfigError("--autoscale", "nobody starts and stops instances here: set --actuator, or only observe")
    check_amounts(config)
    if config.slo_tpot_ms <= 0:
        raise ConfigError("--slo-tpot-ms", f"{config.slo_tpot_ms:g}: autoscaling needs the time that a token may take")
    if config.autoscale_min_attention < 1:
        raise ConfigError("--autoscale-min-attention", f"{config.autoscale_min_attention} is below 1")
    if config.autoscale_window_s < LEAST_WINDOW_S:
        window = f"{config.autoscale_window_s:g} s: gateways report once a second, so at least {LEAST_WINDOW_S:g}"
        raise ConfigError("--autoscale-window-s", window)
    if config.autoscale_min_experts == 0 and config.autoscale_idle_s < config.autoscale_window_s:
        raise ConfigError("--autoscale-idle-s", f"{config.autoscale_idle_s:g} s is less than --autoscale-window-s")


def check_amounts(config: SchedulerConfig) -> None:
    """Raises ConfigError for what is negative or no number."""
    others = "min_experts", "max_attention", "max_experts", "window_s", "cooldown_s", "idle_s"
    for name in ("slo_tpot_ms", "slo_ttft_ms", *(f"autoscale_{other}" for other in others)):
        if not 0 <= (value := getattr(config, name)) < np.inf:
            raise ConfigError("--" + name.replace("_", "-"), f"{value:g} is below 0, or no number")
