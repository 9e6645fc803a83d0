"""run(): check a run's input, and train, mine and evaluate in its folder.

Imports torch, Ray and faiss only after the checks that need none of them: that takes seconds, and
a minute on a busy machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.format.header import CORRECT_KEY
from s4g_ray.distributed.start_checks import check_session
from s4g_ray.encoder.weights_file import find_weights
from s4g_ray.pipeline.callbacks import Callback
from s4g_ray.pipeline.loggers.logger_checks import check_loggers
from s4g_ray.pipeline.preemption import Preemption
from s4g_ray.pipeline.preflight import check_gpu_use, open_run_data
from s4g_ray.pipeline.run_start import check_start
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.ownership.lease import owning

if TYPE_CHECKING:
    from s4g_ray.pipeline.run_folder import RunResult

MOVED = "if it has moved, add data.uri=ITS_NEW_PLACE"  # the data set of a resumed run


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    from_epoch: int | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train, mine and evaluate as configured; publish everything in `config.run_dir`.

    A run folder that exists is continued only when `resume` is given. from_epoch: continue from the
    checkpoint after this epoch as a branch, which may have another learning rate, precision or
    schedule; what followed is kept in RUN/branches/. steal: as Lease.acquire. SIGTERM ends the run
    within checkpoint.grace_s, with a checkpoint of the step in progress. `callbacks` receive the
    records that are logged from now on. Raises InputError for bad input (before anything is
    written), RunError when the run cannot continue, and the error of a callback.
    """
    s3_settings.apply(config.storage)
    check_loggers(config.loggers)  # TensorBoard's writer is torch's: it is imported here
    check_gpu_use(config)
    check_session(config.ray)
    if isinstance(config.model.pretrained, str) and not resume:  # a checkpoint may be resumed
        find_weights(config.model.pretrained)
    reporter = reporter or Reporter()
    preemption = Preemption()
    uri = files.absolute(config.run_dir)
    with ExitStack() as stack:
        stack.enter_context(reporter.silencing_left_threads())
        stack.enter_context(preemption.watched())
        open_data = partial(open_run_data, config, MOVED if resume else CORRECT_KEY)
        opened = None
        if steal:  # a living owner is ended only by a command whose input is right
            check_start(uri, resume=resume, from_epoch=from_epoch)
            opened = open_data()
        lease = stack.enter_context(owning(uri, reporter, steal=steal))
        check_start(uri, resume=resume, from_epoch=from_epoch)
        config, dataset, split = opened or open_data()
        from s4g_ray.pipeline.driver import train_in_folder

        result, stopped = train_in_folder(
            config,
            dataset,
            split,
            lease,
            resume=resume,
            from_epoch=from_epoch,
            reporter=reporter,
            preemption=preemption,
            callbacks=callbacks,
        )
    if stopped:  # now that nothing else prints
        reporter.line(stopped)
    return result
