"""Raw text to token shards: the whole of `llama2 prepare`.

    extract     read, clean, judge, sign     every unit of files -> work/parts/00017      all workers, all machines
    dedup       sort keys, compare, decide   work/parts -> work/dedup                     rank 0
    tokenise    text -> ids -> shards        work/parts + work/dedup -> OUT/00017.*       all workers, all machines
    merge       index.json, report.json      one or two sets are whole                    rank 0

Every step leaves its result under its name only when it is whole, and skips what is there. So a run may be killed at
any moment and started again, and the result depends neither on that nor on the number of workers and machines.
"""

import json
import shutil
from typing import Any

from llama2.data.corpus.job import Job, Watch
from llama2.data.corpus.plan import claim, locked
from llama2.data.corpus.settings import PrepareConfig as PrepareConfig
from llama2.data.shards import INDEX


def prepare(config: PrepareConfig, *, watch: Watch = lambda stage, done, n: None) -> dict[str, Any]:
    """Prepare token shards and return the report; ranks other than 0 return an empty one. Raises DataError."""
    job = Job(config)
    if (job.out / INDEX).exists():
        claim(job.out, job.settings, job.plan)
        return json.loads((job.out / "report.json").read_text(encoding="utf-8"))
    claim(job.out, job.settings, job.plan)
    with locked(job.work, config.rank):
        job.extract(watch)
        job.dedup(watch)
        job.tokenise(watch)
        report = job.merge() if config.rank == 0 else {}
    if config.rank == 0 and not config.keep_work:
        shutil.rmtree(job.work)
    return report
