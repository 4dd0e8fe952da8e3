# ruff: noqa: E501 - one mutant, one line
"""Mutation by hand: every mechanism of the method is switched off once, and a test must notice.

    python tests/mutations.py            # a few minutes; exit status 1 if a mutant survives
    python tests/mutations.py trust      # only those whose name contains "trust"

Works on a copy of the package in a temporary folder; the checkout is not touched. Not part of CI,
whose tests it tests: run it when you change the objective or the tests of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change: `old` in `file` becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str = "tests/training/test_symmetric.py"


_OBJECTIVE, _MULTIPLIERS = "tests/test_objective.py", "tests/training/test_multipliers.py"
_TEMPERATURE = "tests/training/test_temperature.py"
_SPLINE = "tests/networks/test_spline.py"
MUTANTS = (
    Mutant("G off", "training/stage.py", "loss = lam * t * terms", "loss = 0 * lam * t * terms"),
    Mutant("F off", "training/stage.py", "_PERIOD * lam * (_REAL", "0 * _PERIOD * lam * (_REAL"),
    Mutant("R off", "training/stage.py", "loss + _PERIOD * t * terms", "loss + 0 * t * terms"),
    Mutant("R without trust", "training/stage.py", "_PERIOD * t * terms", "_PERIOD * terms"),
    Mutant("G without trust", "training/stage.py", "loss = lam * t * terms", "loss = lam * terms"),
    Mutant("F without distrust", "training/stage.py", "(_REAL_WEIGHT * t + (1 - t))", "_REAL_WEIGHT"),
    Mutant("λ frozen", "training/stage.py", "if self.options.adaptive:", "if False:"),
    Mutant("Ĥ frozen", "training/stage.py", "min(self.entropy, held_out_forward)", "self.entropy"),
    Mutant("tolerance off", "training/stage.py", " - self.options.tolerance]", "]"),
    Mutant("non-finite steps", "training/stage.py", "if bool(torch.isfinite(norm)):", "if True:"),
    Mutant("G reweighted off", "objective.py", "(weights * log_p).sum(dim=0)", "log_p.sum(dim=0)"),
    Mutant("slack off", "training/multipliers.py", "(g - self.slack)", "g", _MULTIPLIERS),
    Mutant("cap off", "training/multipliers.py", "clamp(0.0, self.max_multiplier)", "clamp(0.0)", _MULTIPLIERS),
    Mutant("trust constant", "training/multipliers.py", "torch.exp(-gap.clamp(min=0.0))", "torch.ones_like(gap)", _MULTIPLIERS),
    Mutant("KL directions swapped", "objective.py", "return (log_p - log_q).mean(dim=0) + log_z", "return (log_q - log_p).mean(dim=0) + log_z", _OBJECTIVE),
    Mutant("vargrad without proxy", "objective.py", "robust_log_ratio(log_p, log_q.detach(), barrier)", "log_p", _OBJECTIVE),
    Mutant("barrier off", "objective.py", "finite & (log_q > log_q_floor)", "finite", _OBJECTIVE),
    Mutant("P not normalised", "objective.py", "return (log_z - log_q).mean()", "return -log_q.mean()", _OBJECTIVE),
    Mutant("weights not truncated", "objective.py", "log_mean + 0.5 * math.log(num)", "log_mean + math.log(num)", _OBJECTIVE),
    Mutant("contrasts off", "objective.py", "return torch.logsumexp(everything, dim=0) - log_ratio", "return -log_ratio", _OBJECTIVE),
    Mutant("regressions never win", "proxies/experts/fit.py", "        if stop and closed_form_won(fitted):", "        if False:", "tests/proxies/test_experts.py -k has_won"),
    Mutant("nets of residuals seen", "proxies/experts/flow.py", "z[indices], leave_one_out[indices])", "z[indices], net.regression.mean(z[indices]))", "tests/proxies/test_kernel_regression.py -k trains_on"),
    Mutant("kernel without smooth part", "proxies/experts/kernel.py", "return smooth + _LINEAR", "return 0 * smooth + _LINEAR", "tests/proxies/test_kernel_regression.py -k polynomial_fails"),
    Mutant("kernel residuals in sample", "proxies/experts/kernel.py", "leave_one_out = (1.0 - (vectors**2) @ shrink).clamp_min(1e-6)", "leave_one_out = torch.ones_like(values)", "tests/proxies/test_kernel_regression.py -k without_the_pair"),
    Mutant("one ridge for all outputs", "proxies/experts/kernel.py", "stacked.pow(2).mean(dim=1).argmin(dim=0)", "stacked.pow(2).mean(dim=(1, 2)).argmin().expand(target.shape[1])", "tests/proxies/test_kernel_regression.py -k own_ridge"),
    Mutant("race off", "networks/fitting.py", "if best > abandon_above:", "if False:", "tests/proxies/test_likelihood_proxy.py -k far_behind"),
    Mutant("slow fits given up", "networks/fitting.py", "_RACE_SHARE * gained)", "0.0 * gained)", "tests/proxies/test_likelihood_proxy.py -k far_behind"),
    Mutant("races the last of its like", "proxies/experts/fit.py", "if expert.result.early < rival.early:", "if True:", "tests/proxies/test_experts.py -k races"),
    Mutant("mixture of one", "proxies/experts/noise.py", "if score < best:", "if False:", "tests/proxies/test_noise.py -k those_of_the_noise"),
    Mutant("mean not fitted again", "proxies/experts/noise.py", "if not leave_one_out > value:", "if True:", "tests/proxies/test_noise.py -k outliers"),
    Mutant("worse second fit taken", "proxies/experts/noise.py", "if not leave_one_out > value:", "if False:", "tests/proxies/test_noise.py -k predicts_worse"),
    Mutant("outliers keep their influence", "proxies/experts/noise.py", "unfitted().fit(z, target, weights)", "unfitted().fit(z, target)", "tests/proxies/test_noise.py -k outliers"),
    Mutant("weights off", "proxies/experts/gaussian.py", "    if weights is None:\n        weights = torch.ones", "    if True:\n        weights = torch.ones", "tests/proxies/test_noise.py -k no_weight"),
    Mutant("all the way to the proxy", "posteriors/corrected.py", "log_p + self.power * (log_q - log_p)", "log_q", "tests/posteriors/test_correction.py -k pool"),
    Mutant("power without the main's normaliser", "posteriors/power.py", "beta * log_ratio_true - torch.logsumexp(beta * log_ratio, dim=0)", "beta * log_ratio_true", "tests/posteriors/test_correction.py -k best_power"),
    Mutant("power of later rounds", "npe.py", "        if self._round > 0:\n            return 1.0\n", "", "tests/posteriors/test_correction.py -k trainer"),
    Mutant("power not chosen", "npe.py", "self._pooling_power() if power is None else power", "1.0 if power is None else power", "tests/posteriors/test_correction.py -k trainer"),
    Mutant("another regression than the best", "proxies/experts/regression.py", "return regressions[clearly_beaten.index(False)]", "return regressions[0]", "tests/proxies/test_kernel_regression.py -k fitted_already"),
    Mutant("not the simplest regression", "proxies/experts/regression.py", "paired_gain(best, score) > CLEARLY for", "paired_gain(best, score) > 0 for", "tests/proxies/test_kernel_regression.py -k simplest"),
    Mutant("judged by pairs seen", "proxies/folds.py", "rest = torch.cat([*folds[:k], *folds[k + 1 :]])", "rest = train", "tests/proxies/test_folds.py -k has_not_seen_it"),
    Mutant("one fit kept of a bag", "proxies/folds.py", "Bag([fit.net for fit in fits])", "Bag([fits[0].net])", "tests/proxies/test_folds.py -k nets_of_all"),
    Mutant("draws of a bag mixed up", "proxies/folds.py", "torch.cat(parts).argsort()", "torch.cat(parts)", "tests/proxies/test_folds.py -k belong"),
    Mutant("folds of held-out pairs", "proxies/likelihood.py", "base, z, x, train_indices, folds", "base, z, x, torch.cat([train_indices, val_indices]), folds", "tests/proxies/test_folds.py -k do_not_touch"),
    Mutant("no folds", "proxies/likelihood.py", "return next(folds for least, folds in _FOLDS if num_pairs >= least)", "return 1", "tests/proxies/test_folds.py -k for_few"),
    Mutant("net around x itself", "proxies/experts/flow.py", "        if regression is not None:\n            net", "        if False:\n            net", "tests/proxies/test_experts.py -k is_what_a_net"),
    Mutant("ridge off", "proxies/experts/gaussian.py", "torch.logspace(-3, 3, 13", "torch.logspace(-9, -8, 13", "tests/proxies/test_experts.py -k more_features"),
    Mutant("leave-one-out off", "proxies/experts/gaussian.py", "/ leave_one_out[:, None]", "/ 1.0", "tests/proxies/test_experts.py -k more_features"),
    Mutant("no shrinkage", "proxies/experts/gaussian.py", "shrinkage = 1.0 if excess <= estimate else estimate / excess", "shrinkage = 0.0", "tests/proxies/test_experts.py -k more_dimensions"),
    Mutant("Jacobian of the whitening", "proxies/experts/gaussian.py", "whiten(y, z), z) - self.regression", "whiten(y, z), z) - 0 * self.regression", "tests/proxies/test_experts.py -k around"),
    Mutant("binary draws not clamped", "proxies/experts/base.py", "x[:, columns] = torch.minimum(", "torch.minimum(", "tests/proxies/test_draws.py"),
    Mutant("wide draws dropped", "proxies/experts/base.py", "y.shape[1] // NARROW if", "0 if", "tests/proxies/test_draws.py"),
    Mutant("missing draws not replaced", "proxies/likelihood.py", "_ROUNDS = 5", "_ROUNDS = 0", "tests/proxies/test_draws.py"),
    Mutant("sampler not tried", "proxies/given.py", "        if wrong > 0.5 * len(theta):", "        if False:", "tests/proxies/test_given.py -k sampler_unlike"),
    Mutant("priors not compared", "proxies/__init__.py", "        _compare_priors(options.proxy.prior, prior)", "        pass", "tests/proxies/test_given.py -k another_prior"),
    Mutant("builders leak", "npe.py", "elif transformed and known:", "elif False:", "tests/networks/test_builders.py -k cannot_leak"),
    Mutant("bad proxy followed", "training/preparation.py", "if t < options.min_trust:", "if False:", "tests/test_npe.py -k untrustworthy"),
    Mutant("as long for many simulations", "options.py", "max(1.0, num_simulations / 1000)", "1.0", "tests/test_npe.py -k as_long_as"),
    Mutant("steps of the default alone", "training/trainer.py", "self.options.steps_for(len(theta), self", "self.options.steps_for(1000, self", "tests/test_npe.py -k as_long_as"),
    Mutant("steps whatever NPE took", "training/trainer.py", "self._plain_steps += epochs * len(train_loader)", "pass", "tests/test_npe.py -k as_long_as"),
    Mutant("pool of the default alone", "training/preparation.py", "options.draws_for(num_steps)", "10**7", "tests/test_npe.py -k as_long_as"),
    Mutant("potential not tempered", "proxies/base.py", "self.inverse_temperature * self.log_factor", "self.log_factor", _TEMPERATURE),
    Mutant("atomic reading not tempered", "training/held_out.py", "factor = proxy.inverse_temperature * proxy", "factor = proxy", _TEMPERATURE),
    Mutant("pool not tempered", "training/preparation.py", "log_weights = (gamma - 1) *", "log_weights = 0 *", _TEMPERATURE),
    Mutant("tempered pool not used", "training/stage.py", "self.pool_weights = self.pool_weights * pool_weights", "pass", _TEMPERATURE),
    Mutant("temperature of a few pairs", "training/temperature.py", "_PRIOR_SCALE = 0.15", "_PRIOR_SCALE = 15.0", _TEMPERATURE),
    Mutant("temperature by IS normaliser", "training/temperature.py", "ranking_nce_losses(value[0], value[1:])", "value[1:].logsumexp(0) - value[0]", _TEMPERATURE),
    Mutant("contrasts of the prior only", "training/held_out.py", "offsets.append(log_prior - log_m)", "offsets.append(0 * log_m)", _TEMPERATURE),
    Mutant("frozen and tempered", "training/preparation.py", "options.adaptive and options.temper", "options.temper", _TEMPERATURE),
    Mutant("temper dead", "training/preparation.py", "options.adaptive and options.temper", "options.adaptive", _TEMPERATURE),
    Mutant("given likelihood tempered", "training/preparation.py", " and proxy.can_be_tempered", "", _TEMPERATURE),
    Mutant("NPE not a floor", "training/trainer.py", "min(self._best_val_loss + self.options.tolerance, stage.npe_nll)", "float('inf')", "tests/test_npe.py -k annealed_weights"),
    Mutant("spline: heights without slope", "networks/spline.py", "g_y * ratio + g_delta / w", "g_y * ratio", _SPLINE),
    Mutant("spline: log det of the inverse", "networks/spline.py", "-log_det if inverse else log_det", "log_det", _SPLINE),
    Mutant("spline: gradient outside", "networks/spline.py", "torch.where(inside, g_in, g_out)", "g_in", _SPLINE),
    Mutant("spline: bins before", "networks/spline.py", "(g_left + after)", "(0 * g_left + after)", _SPLINE),
    Mutant("spline: main without", "npe.py", "        with_fast_splines(self._neural_net)\n", "", _SPLINE),
)  # fmt: skip


def killed(mutant: Mutant) -> bool:
    """Whether a test fails on the mutant.

    Raises:
        SystemExit: If the code to change is not there, or not only once.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("sbi_jeffreys", "tests"):
            shutil.copytree(REPOSITORY / name, root / name)
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        path = root / "sbi_jeffreys" / mutant.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutant.old) != 1:
            found = source.count(mutant.old)
            raise SystemExit(f"{mutant.name}: {mutant.old!r} occurs {found} times in {path.name}")
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest did not run:\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main() -> int:
    """Run the mutants asked for; the number of survivors, capped at 1."""
    survivors = []
    for mutant in MUTANTS:
        if len(sys.argv) < 2 or sys.argv[1] in mutant.name:
            verdict = killed(mutant)
            print(f"{'killed  ' if verdict else 'SURVIVED'}  {mutant.name}", flush=True)
            survivors += [] if verdict else [mutant.name]
    print(f"{len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
