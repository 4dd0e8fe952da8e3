# ruff: noqa: E501 - one mutant, one line
"""Mutation by hand: every mechanism of the method is switched off once, and a test must notice.

    python tests/mutations.py            # many minutes; exit status 1 if a mutant survives
    python tests/mutations.py trust      # only those whose mark contains "trust"

A line of the package that can be mutated carries the mark `# mutant: NAME`, behind it or on a line
of its own above it. Here stands, by that name, the code that takes its place; the line itself is
not quoted, so it can be reworded. `tests/test_mutations.py` checks that marks and entries agree.
Works on a copy of the package in a temporary folder; not part of CI, whose tests it tests.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "sbi_jeffreys"
_MARK = re.compile(r"# mutant: ([a-z0-9-]+(?:, [a-z0-9-]+)*)")


@dataclass(frozen=True)
class Mutant:
    """One change: the marked code becomes `code`, and one of `tests` must fail.

    Attributes:
        mark: Name of the mark.
        code: What takes the place of the marked lines, indented as they are; may be empty.
        tests: Arguments of pytest.
        lines: How many lines the mark is for.
    """

    mark: str
    code: str
    tests: str
    lines: int = 1


MUTANTS = (
    Mutant(
        "custom-priors-taken-at-their-word",
        "if False:",
        "tests/networks/test_odd_spaces.py -k hides_its_bounds",
    ),
    Mutant(
        "choice-seen-by-all",
        "residuals = target - predict(*2 * (torch.arange(len(z)),))",
        "tests/proxies/test_sparse.py -k of_cross_validation",
    ),
    Mutant(
        "choice-among-many-for-free",
        "return size * math.log(num)",
        "tests/proxies/test_sparse.py -k noise_alone",
    ),
    Mutant("scales-extrapolated", "pass", "tests/proxies/test_sparse.py -k extrapolate"),
    Mutant(
        "dependence-off",
        "for j in range(1, 1):",
        "tests/proxies/test_sparse.py -k correlations_that",
    ),
    Mutant(
        "outliers-choose-scales",
        "_OUTLIER = 1000000",
        "tests/proxies/test_sparse.py -k of_their_own",
    ),
    Mutant(
        "chosen-features-of-one-fit",
        "return False",
        "tests/proxies/test_sparse.py -k averaged_where",
    ),
    Mutant("the-same-expert-twice", "return fits", "tests/proxies/test_sparse.py -k both_kinds"),
    Mutant("one-component-is-a-mixture", "if False:", "tests/proxies/test_sparse.py -k both_kinds"),
    Mutant(
        "small-units-unseen",
        "tiny = False",
        "tests/networks/test_builders.py -k unit_of_x",
    ),
    Mutant(
        "periodic-flows-unconstrained",
        '_THETA_AS_IT_IS = ("mdn",)',
        "tests/networks/test_builders.py -k theta_as_it_is",
    ),
    Mutant("kinds-not-loaded", "pass", "tests/networks/test_transforms.py -k loaded_state"),
    Mutant(
        "constant-outputs-may-be-anything",
        "pass",
        "tests/diagnostics/test_misspecification.py -k never_varies",
    ),
    Mutant(
        "excluded-pairs-count",
        "return -(weights * log_p).mean()",
        "tests/training/test_kernel.py -k no_density",
    ),
    Mutant(
        "excluded-pairs-are-evidence",
        "return weights",
        "tests/training/test_kernel.py -k not_surer",
    ),
    Mutant(
        "kernels-scale-decides",
        "scale = torch.ones_like(scale)",
        "tests/training/test_kernel.py -k decide_the_trust",
    ),
    Mutant(
        "forward-term-by-another-scale",
        "kernel = arguments.kernel",
        "tests/training/test_kernel.py -k in_the_units",
    ),
    Mutant(
        "errors-without-weights",
        "stage, self.weights = self.stage, None",
        "tests/training/test_kernel.py -k is_reported",
    ),
    Mutant(
        "gap-not-weighted",
        "gap = Estimate.of(main_losses - proxy_losses)",
        "tests/training/test_kernel.py -k is_reported",
    ),
    Mutant(
        "trusted-by-excluded-pairs", "if False:", "tests/training/test_kernel.py -k excludes_every"
    ),
    Mutant(
        "judged-by-excluded-pairs", "if False:", "tests/training/test_own_space.py -k do_not_choose"
    ),
    Mutant(
        "errors-of-excluded-pairs", "if False:", "tests/training/test_kernel.py -k weighted_errors"
    ),
    Mutant(
        "all-pairs-embedded-at-once",
        "pairs = zip([self.theta], [self.x])",
        "tests/training/test_kernel.py -k at_once",
    ),
    Mutant(
        "pooled-folds-lost",
        "proxy = PooledProxy(prior, options.energy, None, *likelihood[:2])",
        "tests/proxies/test_pooled.py -k as_many_folds",
    ),
    Mutant(
        "given-proxy-fitted-in-place",
        "return proxy",
        "tests/proxies/test_sharing.py -k two_trainers",
    ),
    Mutant("refit-remembers", "pass", "tests/proxies/test_sharing.py -k second_fit"),
    Mutant(
        "equal-experts-all-dropped",
        "least = _MIN_WEIGHT",
        "tests/proxies/test_sharing.py -k fifty",
    ),
    Mutant(
        "pool-size-forgotten",
        "pool = Pool(theta, x, weights)",
        "tests/contract/test_contract_rounds.py -k no_more_pairs",
    ),
    Mutant("pool-shrinks", "size = len(self.pool.x)", "tests/training/test_loss.py -k shrink"),
    Mutant("old-pool-shrinks", "pass", "tests/training/test_loss.py -k pickled_before"),
    Mutant(
        "pairs-in-order-of-experts",
        "order = torch.arange(len(torch.cat(kept)))",
        "tests/proxies/test_draws.py -k order_of_theta",
    ),
    Mutant(
        "as-many-draws-in-later-rounds",
        "pass",
        "tests/contract/test_contract_rounds.py -k fewer_pairs",
    ),
    Mutant(
        "pool-of-all-rounds",
        "return self.train",
        "tests/contract/test_contract_rounds.py -k rounds_that_decide",
    ),
    Mutant(
        "pairs-of-proposals-kept",
        "for step in range(0):",
        "tests/proxies/test_chains.py -k under_the_prior",
    ),
    Mutant(
        "steps-of-chains-always-accepted",
        "accept = torch.isfinite(log_odds)",
        "tests/proxies/test_chains.py",
    ),
    Mutant("chains-never-jump", "independent = False", "tests/proxies/test_chains.py -k modes"),
    Mutant(
        "jumps-by-the-target-alone",
        "log_odds = torch.zeros_like(log_target)",
        "tests/proxies/test_chains.py",
    ),
    Mutant(
        "pairs-outside-the-prior-followed",
        "inside = torch.ones_like(theta[..., 0])",
        "tests/training/test_pool.py -k never_drawn",
    ),
    Mutant(
        "first-rounds-decide",
        "return trainer.val_indices",
        "tests/contract/test_contract_rounds.py -k latest",
    ),
    Mutant(
        "apart-in-silence", "elif False:", "tests/training/test_guard_and_report.py -k not_reached"
    ),
    Mutant(
        "contrasts-never-drawn-anew",
        "if self.pool is None:",
        "tests/proxies/test_energy.py -k drawn_anew",
    ),
    Mutant("main-sees-distractors", "pass", "tests/proxies/test_screening.py"),
    Mutant(
        "correlated-noise-compressed",
        "if False:",
        "tests/proxies/test_compression.py -k correlated",
    ),
    Mutant(
        "two-noise-levels-compressed",
        "if not gain <= CLEARLY:",
        "tests/proxies/test_compression.py -k several",
    ),
    Mutant(
        "nearly-all-directions-kept",
        "if not 0 < directions.shape[1] < WIDE:",
        "tests/proxies/test_compression.py -k nearly",
    ),
    Mutant("summaries-whatever-they-cost", "if False:", "tests/training/test_refit.py -k worse"),
    Mutant("half-fitted-main-left", "pass", "tests/training/test_refit.py -k interrupt"),
    Mutant("main-sees-noise", "pass", "tests/training/test_refit.py -k later_rounds_start"),
    Mutant(
        "renewed-at-gamma-one",
        "self.pool.weights = torch.ones(len(x))",
        "tests/training/test_loss.py -k weighed",
    ),
    Mutant("energy-alone", "return energy", "tests/proxies/test_pooled.py"),
    Mutant(
        "negative-powers-cut-off", "while False:", "tests/proxies/test_pooled.py -k contradicts"
    ),
    Mutant(
        "ranks-among-a-few-draws",
        "by_ranks = True",
        "tests/diagnostics/test_diagnostics.py -k few_effective",
    ),
    Mutant(
        "main-judged-for-corrected",
        "judged = against",
        "tests/diagnostics/test_diagnostics.py -k not_blamed",
    ),
    Mutant(
        "focused-judged-elsewhere",
        "elif False:",
        "tests/diagnostics/test_bad_arguments_diagnostics.py -k report",
    ),
    Mutant(
        "tail-of-nearly-equal-weights",
        "light = self.pareto_k <= _MAX_PARETO_K",
        "tests/posteriors/test_importance.py -k what_is_reliable",
    ),
    Mutant(
        "adapted-to-ten-thousand-draws",
        "for _ in range(1):",
        "tests/posteriors/test_importance.py -k many_candidates",
    ),
    Mutant(
        "missing-values-reach-the-main",
        "if False:",
        "tests/posteriors/test_for_any.py -k no_net_masks",
    ),
    Mutant(
        "constant-summaries-modelled",
        "if False:",
        "tests/test_npe.py -k fall_back_and_name",
    ),
    Mutant("powers-without-prior", "pass", "tests/proxies/test_pooled.py -k few_pairs"),
    Mutant(
        "the-probable-are-suspicious",
        "as_low = (simulated >= observed.unsqueeze(1)).sum(dim=1)",
        "tests/diagnostics/test_misspecification.py",
    ),
    Mutant(
        "sample-size-cancels",
        "pass",
        "tests/test_objective.py -k up_to_a_factor",
    ),
    Mutant(
        "anchor-seeds-every-device",
        "torch.manual_seed(0)",
        "tests/proxies/test_likelihood_proxy.py -k seed_every_device",
    ),
    Mutant(
        "far-draws-in-moments",
        "near = torch.ones_like(weights, dtype=torch.bool)",
        "tests/proxies/test_normaliser.py -k far_away",
    ),
    Mutant(
        "ties-alike-in-all-columns",
        "order = noise[:, :1].argsort(dim=0).expand_as(noise)",
        "tests/proxies/test_screening.py -k constant",
    ),
    Mutant(
        "map-of-the-main",
        "self.proxy = proxy",
        "tests/posteriors/test_correction.py -k mode_of_the_target",
    ),
    Mutant(
        "atoms-judged-by-smooth-flows",
        "if False:",
        "tests/proxies/test_likelihood_of_atoms.py -k spline",
    ),
    Mutant(
        "second-doubling-as-cheap-as-the-first",
        "bound = APART",
        "tests/training/test_symmetric.py -k longer",
    ),
    Mutant("stage-never-longer", "pass", "tests/training/test_symmetric.py -k longer"),
    Mutant("annealed-stage-adapted", "if False:", "tests/training/test_symmetric.py -k few_epochs"),
    Mutant("stage-never-shorter", "pass", "tests/training/test_symmetric.py -k shorter"),
    Mutant(
        "length-asked-for-adapted",
        "if self._settled:",
        "tests/training/test_symmetric.py -k shorter",
    ),
    Mutant("absurd-at-some-x-followed", "shares.append(share)", "tests/training/test_pool.py"),
    Mutant("own-space-always", "kept = Space.OWN", "tests/training/test_own_space.py -k kept"),
    Mutant("own-space-never", "kept = Space.PRIOR", "tests/training/test_own_space.py -k kept"),
    Mutant(
        "own-space-without-margin",
        "kept = Space.OWN if gain.value > 0 else Space.PRIOR",
        "tests/training/test_own_space.py -k error",
    ),
    Mutant(
        "own-space-of-later-rounds",
        "first_round = True",
        "tests/training/test_own_space.py -k round",
    ),
    Mutant(
        "report-of-the-other-network", "pass", "tests/training/test_own_space.py -k interrupted"
    ),
    Mutant("own-space-trained-further", "pass", "tests/training/test_own_space.py -k round"),
    Mutant("weights-of-another-space", "pass", "tests/training/test_own_space.py -k saved"),
    Mutant(
        "another-split",
        "self.train_indices, self.val_indices = other.val_indices, other.train_indices",
        "tests/training/test_own_space.py -k split",
    ),
    Mutant("no-draw-inside-wins", "pass", "tests/training/test_own_space.py -k never_accept"),
    Mutant(
        "leakage-not-corrected",
        "return self.main_losses(main)",
        "tests/training/test_own_space.py -k loss",
    ),
    Mutant("refused-call-forgets", "pass", "tests/training/test_refused.py -k refuses"),
    Mutant(
        "plain-npe-after-a-refusal",
        "if True:",
        "tests/training/test_refused.py -k keeps_its_weights",
    ),
    Mutant(
        "refused-call-swaps-the-main",
        "self.put_back(trainer)\nheld_out = data.held_out_pairs(trainer, self.starting_round, arguments)",
        "tests/training/test_refused.py -k bad_kernel",
    ),
    Mutant(
        "report-of-an-earlier-training",
        'self.report: TrainingReport | None = getattr(self, "report", None)',
        "tests/training/test_refused.py -k interrupted",
    ),
    Mutant(
        "coverage-of-a-changed-npe",
        "hand_back_embedding(found.proxy, main)\ncoverage = None if held_out.atomic else held_out.coverage(main, found.proxy.prior)",
        "tests/training/test_beginning.py -k coverage",
    ),
    Mutant("changed-npe-left-in-the-main", "pass", "tests/training/test_beginning.py -k before"),
    Mutant("restarted-from-plain-npe", "if False:", "tests/training/test_beginning.py -k restart"),
    Mutant("no-candidate-in-a-thin-region", "if False:", "tests/proxies/test_truncated.py -k few"),
    Mutant("restarted-without-warm-up", "pass", "tests/training/test_beginning.py -k restart"),
    Mutant("focused-without-gradients", "", "tests/posteriors/test_focus.py -k callers_mode"),
    Mutant("simulations-with-gradients", "pass", "tests/test_npe.py -k differentiable"),
    Mutant("copies-in-silence", "if False:", "tests/test_npe.py -k copies"),
    Mutant("warns-at-its-own-line", "while False:", "tests/test_npe.py -k copies"),
    Mutant(
        "main-needs-bijection",
        "as_it_is = DirectPosteriorParameters()",
        "tests/posteriors/test_for_any.py -k bijection",
    ),
    Mutant("unreadable-folder-is-empty", "pass", "tests/benchmark/test_runner.py -k report_of"),
    Mutant(
        "second-npe-must-not-fail",
        "except NotImplementedError as error:",
        "tests/training/test_own_space.py -k fails",
    ),
    Mutant(
        "last-epoch-not-judged",
        "elif self.stage.finished:",
        "tests/contract/test_contract_saving.py -k last_epoch",
    ),
    Mutant(
        "interrupted-last-epoch-left-out",
        "while not stage.finished and epochs < max_epochs:",
        "tests/contract/test_contract_saving.py -k last_epoch",
    ),
    Mutant("constant-parameters-modelled", "if False:", "tests/training/test_guard_and_report.py"),
    Mutant("worse-main-handed-out", "kept = True", "tests/posteriors/test_focus.py"),
    Mutant("last-weights-of-a-focus", "if True:", "tests/posteriors/test_focus.py"),
    Mutant(
        "judged-by-what-it-was-fitted-to",
        "halves = (torch.arange(len(theta)),) * 2",
        "tests/posteriors/test_focus.py -k judged",
    ),
    Mutant(
        "lowest-count-open",
        'self.register_buffer("low", low)',
        "tests/proxies/test_neural.py -k lowest_of_many",
    ),
    Mutant(
        "large-units-are-counts",
        "integer = (kept == kept.round()).all(dim=0)",
        "tests/networks/test_transforms.py -k resolve",
    ),
    Mutant(
        "half-lines-by-the-logit",
        "rounded = v.abs() > _EDGE",
        "tests/networks/test_odd_spaces.py -k do_not_lie",
    ),
    Mutant(
        "scales-in-units-of-one",
        "least = torch.full_like(wide[0], 1e-7)",
        "tests/networks/test_transforms.py -k unit_of_x",
    ),
    Mutant(
        "beyond-a-limit-is-at-it",
        "",
        "tests/diagnostics/test_misspecification.py -k sentinel",
    ),
    Mutant(
        "distances-from-zero",
        "centred = points.transpose(1, 2)",
        "tests/proxies/test_normaliser.py -k far_from_zero",
    ),
    Mutant(
        "many-parameters-explain-anything",
        "excess = 1.0",
        "tests/proxies/test_compression.py -k many_parameters",
    ),
    Mutant(
        "losses-of-the-proxy-grow-with-every-pause",
        "symmetric.evaluate(held_out, symmetric.proxy_losses)",
        "tests/contract/test_contract_saving.py -k between_batches",
    ),
    Mutant(
        "resumed-with-another-batch",
        "for _ in range(0):",
        "tests/contract/test_contract_saving.py -k between_batches",
    ),
    Mutant(
        "focus-without-reverse", "reverse = 0.0 * log_p.sum()", "tests/posteriors/test_focus.py"
    ),
    Mutant("stage-length-dead", "return steps", "tests/test_npe.py"),
    Mutant(
        "one-failure-spoils-all",
        "pass",
        "tests/networks/test_together.py -k recovers",
    ),
    Mutant(
        "one-network-after-another",
        "results = [t.fit(on_epoch) for t in tasks]",
        "tests/proxies/test_experts.py -k in_one_pass",
    ),
    Mutant("late-learners-abandoned", "if False:", "tests/proxies/test_experts.py -k in_waves"),
    Mutant(
        "held-out-without-whitening",
        "log_det = log_det + 0 * regression.log_det",
        "tests/proxies/test_experts.py -k is_what_a_net",
    ),
    Mutant(
        "logit-instead-of-probit",
        "u, log_slope = v, torch.zeros_like(v)",
        "tests/networks/test_transforms.py",
    ),
    Mutant(
        "g-off",
        'loss = 0 * multiplier * trust * terms["generated"]',
        "tests/training/test_symmetric.py",
    ),
    Mutant("f-off", 'loss = loss + 0 * terms["forward"]', "tests/training/test_symmetric.py"),
    Mutant("r-off", 'loss = loss + 0 * terms["reverse"]', "tests/training/test_symmetric.py"),
    Mutant(
        "r-without-trust",
        'loss = loss + PERIOD * terms["reverse"]',
        "tests/training/test_symmetric.py",
    ),
    Mutant(
        "g-without-trust",
        'loss = multiplier * terms["generated"]',
        "tests/training/test_symmetric.py",
    ),
    Mutant("f-without-distrust", "weight = _REAL_WEIGHT", "tests/training/test_symmetric.py"),
    Mutant("lambda-frozen", "if False:", "tests/training/test_symmetric.py"),
    Mutant("entropy-frozen", "self.entropy = self.entropy", "tests/training/test_symmetric.py"),
    Mutant(
        "tolerance-off",
        "self.multipliers.update([held_out_forward - self.entropy])",
        "tests/training/test_symmetric.py",
    ),
    Mutant("non-finite-steps", "if True:", "tests/training/test_symmetric.py"),
    Mutant("g-reweighted-off", "return -log_p.mean()", "tests/test_objective.py -k reweighted"),
    Mutant(
        "slack-off",
        "proposed = self.multipliers + self.step_size * self.price * g",
        "tests/training/test_multipliers.py",
    ),
    Mutant("cap-off", "proposed = proposed.clamp(0.0)", "tests/training/test_multipliers.py"),
    Mutant(
        "trust-constant",
        "return torch.where(torch.isfinite(gap), torch.ones_like(gap), torch.zeros_like(gap))",
        "tests/training/test_multipliers.py",
    ),
    Mutant(
        "kl-directions-swapped",
        "return (log_q - log_p).mean(dim=0) + log_z",
        "tests/test_objective.py",
    ),
    Mutant("vargrad-without-proxy", "ratio = log_p", "tests/test_objective.py"),
    Mutant(
        "barrier-off",
        "log_q = torch.where(finite, log_q, bounded_log_q)",
        "tests/test_objective.py",
    ),
    Mutant("barrier-one-sided", "lowest = ratio", "tests/test_objective.py -k proxys_mass"),
    Mutant("p-not-normalised", "return -log_q.mean()", "tests/test_objective.py"),
    Mutant(
        "weights-not-truncated",
        "log_weights = torch.minimum(log_weights, log_mean + math.log(num))",
        "tests/test_objective.py",
    ),
    Mutant("contrasts-off", "return -log_ratio", "tests/test_objective.py"),
    Mutant("regressions-never-win", "while pending:", "tests/proxies/test_experts.py -k has_won"),
    Mutant(
        "nets-of-residuals-seen",
        "pass",
        "tests/proxies/test_kernel_regression.py -k trains_on",
    ),
    Mutant(
        "kernel-without-smooth-part",
        "return 0 * smooth + _LINEAR * (1.0 + inner)",
        "tests/proxies/test_kernel_regression.py -k polynomial_fails",
    ),
    Mutant(
        "kernel-residuals-in-sample",
        "leave_one_out = torch.ones_like(values)",
        "tests/proxies/test_kernel_regression.py -k without_the_pair",
    ),
    Mutant(
        "one-ridge-for-all-outputs",
        "best = stacked.pow(2).mean(dim=(1, 2)).argmin().expand(target.shape[1])",
        "tests/proxies/test_kernel_regression.py -k own_ridge",
    ),
    Mutant("race-off", "if False:", "tests/proxies/test_likelihood_proxy.py -k far_behind"),
    Mutant(
        "slow-fits-given-up",
        "return self.early + max(_RACE_MARGIN, 0.0 * gained)",
        "tests/proxies/test_likelihood_proxy.py -k far_behind",
    ),
    Mutant(
        "races-the-last-of-its-like",
        "best = results[-1] if results else FitResult(math.inf, 0)",
        "tests/proxies/test_experts.py -k races",
    ),
    Mutant("mixture-of-one", "if True:", "tests/proxies/test_noise.py -k those_of_the_noise"),
    Mutant("hopeless-mixtures-fitted", "if False:", "tests/proxies/test_noise.py -k bic_rises"),
    Mutant("mean-not-fitted-again", "if True:", "tests/proxies/test_noise.py -k outliers"),
    Mutant("worse-second-fit-taken", "if False:", "tests/proxies/test_noise.py -k predicts_worse"),
    Mutant(
        "outliers-keep-their-influence",
        "again = best.regression.unfitted().fit(z, target)",
        "tests/proxies/test_noise.py -k outliers",
    ),
    Mutant(
        "weights-off",
        "if True:\n    weights = torch.ones(len(y)).to(y)",
        "tests/proxies/test_noise.py -k no_weight",
        lines=2,
    ),
    Mutant(
        "all-the-way-to-the-proxy",
        "return torch.where(outside, log_q, log_q)",
        "tests/posteriors/test_correction.py -k pool",
    ),
    Mutant(
        "power-without-the-main-s-normaliser",
        "(beta * log_ratio_true).mean()",
        "tests/posteriors/test_correction.py -k best_power",
    ),
    Mutant("adapted-to-nothing", "if False:", "tests/posteriors/test_importance.py -k no_proposal"),
    Mutant(
        "candidates-never-adapted",
        "return found",
        "tests/posteriors/test_importance.py -k far_off",
    ),
    Mutant(
        "power-of-later-rounds",
        "choose = pooling_power",
        "tests/posteriors/test_correction.py -k trainer",
    ),
    Mutant(
        "power-not-chosen",
        "1.0 if power is None else power,",
        "tests/posteriors/test_correction.py -k trainer",
    ),
    Mutant(
        "another-regression-than-the-best",
        "return regressions[0]",
        "tests/proxies/test_kernel_regression.py -k fitted_already",
    ),
    Mutant(
        "not-the-simplest-regression",
        "clearly_beaten = [paired_gain(best, score) > 0 for score in scores]",
        "tests/proxies/test_kernel_regression.py -k simplest",
    ),
    Mutant(
        "judged-by-pairs-seen", "rest = train", "tests/proxies/test_folds.py -k has_not_seen_it"
    ),
    Mutant(
        "one-fit-kept-of-a-bag",
        "bag = Bag([fits[0].net]) if spec.averaged else None",
        "tests/proxies/test_folds.py -k nets_of_all",
    ),
    Mutant(
        "draws-of-a-bag-mixed-up",
        "return torch.cat(drawn, dim=-2)[..., torch.cat(parts), :]",
        "tests/proxies/test_folds.py -k belong",
    ),
    Mutant(
        "folds-of-held-out-pairs",
        "fitted, self._folds = fit_folds(experts, base, z, x, torch.cat([train_indices, val_indices]), folds, on_epoch)",
        "tests/proxies/test_folds.py -k do_not_touch",
    ),
    Mutant("no-folds", "return 1", "tests/proxies/test_folds.py -k for_few"),
    Mutant(
        "net-around-x-itself",
        "whole = net",
        "tests/proxies/test_experts.py -k is_what_a_net",
    ),
    Mutant(
        "ridge-off",
        "_RIDGE_GRID = torch.logspace(-9, -8, 13, dtype=torch.float64)",
        "tests/proxies/test_experts.py -k more_features",
    ),
    Mutant(
        "leave-one-out-off",
        "residuals = (target - u @ (shrink.unsqueeze(1) * projection)) / 1.0",
        "tests/proxies/test_experts.py -k more_features",
    ),
    Mutant("no-shrinkage", "shrinkage = 0.0", "tests/proxies/test_experts.py -k more_dimensions"),
    Mutant(
        "jacobian-of-the-whitening",
        "return self.net.loss(e, z) - 0 * log_det",
        "tests/proxies/test_experts.py -k around",
    ),
    Mutant(
        "binary-draws-not-clamped",
        "torch.minimum(torch.maximum(x[:, columns], self.values[0]), self.values[1])",
        "tests/proxies/test_draws.py",
    ),
    Mutant(
        "wide-draws-dropped",
        "allowed = 0 if y.shape[1] > NARROW else 0",
        "tests/proxies/test_draws.py",
    ),
    Mutant(
        "missing-draws-not-replaced",
        "_ROUNDS = 0  # in which draws are replaced that were not plausible",
        "tests/proxies/test_draws.py",
    ),
    Mutant("sampler-not-tried", "if False:", "tests/proxies/test_given.py -k sampler_unlike"),
    Mutant("priors-not-compared", "pass", "tests/proxies/test_given.py -k another_prior"),
    Mutant("bad-proxy-followed", "if False:", "tests/test_npe.py -k untrustworthy"),
    Mutant(
        "as-long-for-many-simulations", "growth = 1.0 ** _GROWTH", "tests/test_npe.py -k as_long_as"
    ),
    Mutant(
        "steps-of-the-default-alone",
        "num_steps = options.steps_for(simulations.in_use)",
        "tests/test_npe.py -k as_long_as",
    ),
    Mutant("steps-whatever-npe-took", "self.plain_steps = 0", "tests/test_npe.py -k as_long_as"),
    Mutant(
        "pool-of-the-default-alone",
        "num_draws = options.draws_for(600)",
        "tests/test_npe.py -k as_long_as",
    ),
    Mutant(
        "potential-not-tempered",
        "factor = self.log_factor(safe, x)",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "atomic-reading-not-tempered",
        "factor = proxy.log_factor(theta, self.x)",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "pool-not-tempered",
        "log_weights = 0 * proxy.log_factor(theta.unsqueeze(0), x)[0]",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "tempered-pool-not-used",
        "weights = x.new_ones(len(x))",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "temperature-of-a-few-pairs", "_PRIOR_SCALE = 15.0", "tests/training/test_temperature.py"
    ),
    Mutant(
        "temperature-by-is-normaliser",
        "losses = value[1:].logsumexp(0) - value[0]",
        "tests/training/test_temperature.py -k few_contrasts",
    ),
    Mutant(
        "contrasts-of-the-prior-only",
        "found = Evidence(0 * draws.offset, draws.factor, as_evidence(self.weights))",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "pool-weighted-for-nothing",
        "pass",
        "tests/training/test_temperature.py -k worth_weighting",
    ),
    Mutant(
        "weighted-for-nothing-after-all",
        "pass",
        "tests/training/test_temperature.py -k what_a_pool_leaves",
    ),
    Mutant(
        "unseen-training-pairs-no-evidence",
        "gamma = 1.0",
        "tests/training/test_temperature.py -k made_to_judge",
    ),
    Mutant(
        "judged-too-wide",
        "if not cross_fitted:",
        "tests/training/test_temperature.py -k made_to_judge",
    ),
    Mutant(
        "contrasts-far-away",
        "if True:",
        "tests/training/test_temperature.py -k all_miss",
    ),
    Mutant(
        "one-pair-sets-the-temperature",
        "return losses",
        "tests/training/test_temperature.py -k far_out",
    ),
    Mutant(
        "one-fit-judged-by-held-out-pairs-alone",
        "if False:",
        "tests/proxies/test_folds.py -k to_be_judged",
    ),
    Mutant(
        "temperature-of-held-out-pairs-alone",
        "evidence = []",
        "tests/training/test_temperature.py -k with_folds",
    ),
    Mutant(
        "temperature-sharpens-only",
        "if False:",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "pool-weights-collapse",
        "while False:",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "few-draws-moved-among-themselves",
        "draws = resample(found, num)[:, 0]",
        "tests/posteriors/test_moves.py -k among_many",
    ),
    Mutant(
        "copies-kept",
        "if False:",
        "tests/posteriors/test_importance.py -k no_proposal_mends",
    ),
    Mutant(
        "every-move-accepted",
        "accept = torch.ones_like(log_proposed, dtype=torch.bool)",
        "tests/posteriors/test_moves.py -k skewed",
    ),
    Mutant(
        "simplex-modelled",
        "return False",
        "tests/networks/test_odd_spaces.py -k without_volume",
    ),
    Mutant(
        "loaded-prior-unknown",
        "return proposal",
        "tests/contract/test_contract_saving.py -k knows_the_users_prior",
    ),
    Mutant(
        "one-parameter-refused",
        "return prior",
        "tests/contract/test_contract_rounds.py -k as_torch_writes_it",
    ),
    Mutant(
        "one-noise-level-for-all",
        "width, functions = max(1, hidden_features // 4), 1",
        "tests/proxies/test_neural.py -k two_signals",
    ),
    Mutant(
        "noise-levels-of-one-output",
        "return True",
        "tests/proxies/test_neural.py -k single_output",
    ),
    Mutant(
        "cells-as-densities",
        "mass = log_prob[..., has]",
        "tests/proxies/test_neural.py",
    ),
    Mutant("grid-taken-for-atoms", "if True:", "tests/networks/test_atoms.py -k grid"),
    Mutant(
        "atoms-as-densities",
        "return slopes",
        "tests/networks/test_atoms.py -k density",
    ),
    Mutant(
        "atoms-without-cells",
        "found = find_atoms(kept[:0])",
        "tests/proxies/test_likelihood_of_atoms.py -k share",
    ),
    Mutant(
        "atoms-not-spread",
        "y = self._values(noisy + 0.5 * self.integer)",
        "tests/networks/test_atoms.py -k evenly",
    ),
    Mutant("counts-with-atoms", "", "tests/networks/test_atoms.py -k counts"),
    Mutant("limits-not-open", "low=values,", "tests/networks/test_atoms.py -k beyond"),
    Mutant(
        "atoms-without-tobit",
        "mass = torch.where(self.transform.integer[has], mass, log_prob[..., has])",
        "tests/proxies/test_likelihood_of_atoms.py -k tobit",
    ),
    Mutant(
        "parameters-with-cells",
        "transform = MarginalTransform.fit(theta[train_indices])",
        "tests/proxies/test_likelihood_of_atoms.py -k conditions",
    ),
    Mutant(
        "tiny-parameters-unseen",
        "scaled = Units.fit(torch.ones(2, theta.shape[1]))",
        "tests/proxies/test_units.py -k networks_see",
    ),
    Mutant("lattices-as-densities", "if False:", "tests/proxies/test_units.py"),
    Mutant(
        "kernels-in-units-of-one",
        "return torch.ones_like(unit)",
        "tests/proxies/test_normaliser.py -k units_of",
    ),
    Mutant("few-pairs-divided", "if not folds and of_x:", "tests/test_npe.py -k handful"),
    Mutant("features-chosen-by-few-pairs", "enough = True", "tests/test_npe.py -k handful"),
    Mutant("latent-counts-dropped", "pass", "tests/proxies/test_neural.py -k rare"),
    Mutant("cells-by-their-middle", "if True:", "tests/proxies/test_neural.py"),
    Mutant("distractors-kept", "if False:", "tests/proxies/test_screening.py"),
    Mutant(
        "collapsed-weights-trusted",
        "share = torch.ones(len(torch.cat(effective)))",
        "tests/training/test_pool.py",
    ),
    Mutant(
        "own-scale-is-fixed",
        "parameters = [] if net is None else list(net.parameters())",
        "tests/proxies/test_summary.py",
    ),
    Mutant(
        "one-energy-of-several",
        "return factors[0]",
        "tests/proxies/test_energy.py -k several",
    ),
    Mutant("pool-never-renewed", "if False:", "tests/training/test_loss.py"),
    Mutant(
        "training-pairs-overfitted",
        'if "forward" in terms:',
        "tests/training/test_loss.py",
    ),
    Mutant(
        "frozen-and-tempered",
        "if options.temper:",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "temper-dead",
        "if options.adaptive:",
        "tests/training/test_temperature.py",
    ),
    Mutant(
        "given-likelihood-tempered",
        "if False:",
        "tests/training/test_temperature.py -k taken_at_its_word",
    ),
    Mutant(
        "npe-not-a-floor",
        "bound = self.best.value + margin",
        "tests/test_npe.py -k annealed_weights",
    ),
    Mutant(
        "npe-by-its-luck",
        "floor = stage.npe_nll",
        "tests/test_npe.py -k lucky_npe",
    ),
    Mutant(
        "lucky-epochs-kept",
        "margin = stage.options.tolerance",
        "tests/test_npe.py -k lucky_epoch",
    ),
    Mutant(
        "spline-heights-without-slope",
        "g_size = torch.stack([-(g_xi * xi + g_delta * delta) / w, g_y * ratio])",
        "tests/networks/test_spline.py",
    ),
    Mutant(
        "old-weights-remembered",
        "return True",
        "tests/networks/test_at_once.py -k notices",
    ),
    Mutant(
        "gradient-of-weights-lost",
        "return False",
        "tests/networks/test_at_once.py -k is_trained",
    ),
    Mutant(
        "permutations-forgotten",
        "pass",
        "tests/networks/test_at_once.py -k densities",
    ),
    Mutant(
        "weights-copied-twice",
        "return self.__dict__",
        "tests/networks/test_at_once.py -k copies",
    ),
    Mutant(
        "flows-one-by-one",
        "log_prob = None",
        "tests/networks/test_at_once.py -k mixture_of_its_flows",
    ),
    Mutant(
        "iterations-whatever-they-cost",
        "if len(shape) == 2 and 1 < min(shape):",
        "tests/networks/test_muon.py -k left_to_adam",
    ),
    Mutant(
        "matrices-by-adam",
        "pass",
        "tests/networks/test_muon.py -k torch_s_muon",
    ),
    Mutant(
        "tanh-as-torch-has-it",
        "return torch.tanh(u)",
        "tests/networks/test_affine.py -k without_gradients",
    ),
    Mutant(
        "scales-in-every-other-column",
        "return scale, shift",
        "tests/networks/test_affine.py -k contiguous",
    ),
    Mutant(
        "main-without-fast-affine-layers",
        "return net",
        "tests/networks/test_affine.py -k have_them",
    ),
    Mutant(
        "spline-log-det-of-the-inverse",
        "log_det = torch.where(inside, log_det, 0.0)",
        "tests/networks/test_spline.py",
    ),
    Mutant(
        "spline-gradient-outside", "return g_in, g_raw[:-1].t()", "tests/networks/test_spline.py"
    ),
    Mutant(
        "spline-bins-before",
        "grad = torch.where(is_before, (0 * g_left + after).unsqueeze(1), after.unsqueeze(1))",
        "tests/networks/test_spline.py",
    ),
    Mutant("guard-off", "return False", "tests/training/test_guard_and_report.py"),
    Mutant("adapted-without-progress", "pass", "tests/proxies/test_normaliser.py -k progress"),
    Mutant("normaliser-one-round", "for _ in range(0):", "tests/proxies/test_normaliser.py"),
    Mutant(
        "normaliser-own-theta-left-out",
        "return self.lower",
        "tests/proxies/test_normaliser.py -k pessimistic",
    ),
    Mutant(
        "no-density-at-the-upper-bound",
        "edge = safe.detach()[none]\ninwards = edge",
        "tests/networks/test_odd_spaces.py -k upper_bound",
        2,
    ),
    Mutant(
        "plain-npe-not-continued",
        "return None",
        "tests/contract/test_contract_saving.py -k cut_short",
    ),
    Mutant(
        "resumed-in-other-units",
        "if False:",
        "tests/contract/test_contract_saving.py -k other_units",
    ),
    Mutant(
        "reweighted-taken-for-a-mixture",
        "reweighted = False",
        "tests/contract/test_contract_rounds.py -k mixture",
    ),
    Mutant(
        "proxy-of-the-latest-rounds-alone",
        "fitted, judging = earlier[:0], earlier[:0]",
        "tests/contract/test_contract_rounds.py -k discard",
    ),
    Mutant(
        "refused-simulations-kept",
        "pass",
        "tests/contract/test_contract_arguments.py -k refused_app",
    ),
    Mutant(
        "settings-mixed-in-a-folder", "pass", "tests/benchmark/test_runner.py -k other_settings"
    ),
    Mutant("no-draws-far-away", "raise", "tests/benchmark/test_compare.py -k left_out", 4),
    Mutant("noise-of-theta-itself", "u = input", "tests/networks/test_odd_spaces.py -k noise_that"),
    Mutant(
        "noise-of-raw-x",
        "return self.estimator.inverse_transform(u, x)",
        "tests/networks/test_odd_spaces.py -k noise_that",
    ),
    Mutant(
        "discrete-parameters-modelled",
        "if False:",
        "tests/networks/test_odd_spaces.py -k discrete_parameters",
    ),
    Mutant("kernel-blamed", "if False:", "tests/test_npe.py -k can_hit"),
    Mutant(
        "truncated-rounds-overlooked",
        "if False:",
        "tests/proxies/test_truncated.py -k compared_and",
    ),
    Mutant("later-rounds-on-few-parameters", "pass", "tests/training/test_pool.py -k distinct"),
    Mutant("edge-not-seen", "if True:", "tests/networks/test_odd_spaces.py -k edge"),
    Mutant("any-config-accepted", "if False:", "tests/networks/test_configs.py"),
    Mutant("z-score-of-config-overridden", "return embeds", "tests/networks/test_configs.py"),
    Mutant("theta-transformed-twice", "by_sbi = False", "tests/networks -k twice"),
    Mutant("transforms-for-every-expert", "no_flow = False", "tests/proxies -k no_flow"),
)


def marked_lines() -> dict[str, list[tuple[Path, int]]]:
    """Where every mark is: the file, and the number of the line that it is for, from 0."""
    found: dict[str, list[tuple[Path, int]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            match = _MARK.search(line)
            if match:
                below = line.strip().startswith("#")
                for mark in match.group(1).split(", "):
                    found.setdefault(mark, []).append((path, number + below))
    return found


def mutated(mutant: Mutant) -> tuple[Path, str]:
    """The file of a mutant, and its text with the mutant in it.

    Raises:
        SystemExit: If the mark is not there, or not only once.
    """
    places = marked_lines().get(mutant.mark, [])
    if len(places) != 1:
        raise SystemExit(f"the mark '# mutant: {mutant.mark}' occurs {len(places)} times")
    path, number = places[0]
    lines = path.read_text(encoding="utf-8").splitlines()
    indentation = re.match(r" *", lines[number])
    assert indentation is not None
    code = textwrap.indent(mutant.code, indentation.group(0)).splitlines()
    lines[number : number + mutant.lines] = code
    return path, "\n".join(lines) + "\n"


def passing(tests: str, path: Path | None = None, text: str = "") -> bool:
    """Whether tests pass on a copy of the package in which `path`, if given, reads `text`.

    Raises:
        SystemExit: If pytest cannot run them, for instance because it selects none.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("sbi_jeffreys", "tests"):
            shutil.copytree(REPOSITORY / name, root / name)
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        if path is not None:
            (root / path.relative_to(REPOSITORY)).write_text(text, encoding="utf-8")
        # Slow tests too: `addopts` leaves them out.
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests.split()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests}: pytest did not run:\n{done.stdout[-2000:]}")
    return done.returncode == 0


@functools.cache
def check_without_mutant(tests: str) -> None:
    """Require that tests pass as things are: one that fails anyway would kill every mutant.

    Raises:
        SystemExit: If they do not.
    """
    if not passing(tests):
        raise SystemExit(f"{tests} fails without any mutant, so it says nothing; mend it first.")


def killed(mutant: Mutant) -> bool:
    """Whether one of the mutant's tests fails with it, and none without it."""
    check_without_mutant(mutant.tests)
    return not passing(mutant.tests, *mutated(mutant))


def unknown_words(mutant: Mutant) -> set[str]:
    """Names in a mutant's code that its file does not have, nor Python, nor torch.

    After a renaming the mutant would raise a NameError, and any test that runs the line would seem
    to notice the mechanism.
    """
    path, _ = mutated(mutant)
    identifier = re.compile(r"[A-Za-z_]\w*")
    known = set(identifier.findall(_MARK.sub("", path.read_text(encoding="utf-8"))))
    known |= {*keyword.kwlist, *dir(builtins), *dir(torch), *dir(torch.Tensor)}
    return set(identifier.findall(mutant.code.partition("#")[0])) - known


def main() -> int:
    """Run the mutants asked for; 1 if one survives."""
    survivors = []
    for mutant in MUTANTS:
        if len(sys.argv) < 2 or sys.argv[1] in mutant.mark:
            verdict = killed(mutant)
            print(f"{'killed  ' if verdict else 'SURVIVED'}  {mutant.mark}", flush=True)
            survivors += [] if verdict else [mutant.mark]
    print(f"{len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
