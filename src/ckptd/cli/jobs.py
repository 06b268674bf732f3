"""`ckptd jobs`: background work, and holding it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import printable, size, table
from ckptd.core.job_names import JOB_NAMES
from ckptd.errors import NotEnoughNodes, UsageError

if TYPE_CHECKING:
    from ckptd.client.jobs import JobList


@click.command("jobs")
@click.argument("action", type=click.Choice(["pause", "resume"]), required=False)
@click.argument("job", type=click.Choice(JOB_NAMES), required=False)
@shared_options
def jobs_command(action: str | None, job: str | None) -> int:
    """Show the background jobs of all nodes; pause JOB on all of them, or resume it.

    \b
    repair      makes copies that are missing          scrub      re-reads every copy
    trim        drops copies beyond the wanted number  gc         removes what nothing names
    rebalance   moves copies to emptier nodes          retention  decides what to delete

    A paused job rests until it is resumed, restarts of nodes included; a slice under way goes to
    its end first. DONE and TOTAL are what the job knows that there is to do.

    \b
    Exit codes: 0 done, 5 a node did not answer, or did not do it: it keeps to what it was told
    before, so repeat the command when it is back. Showing alone needs one node that answers.
    """
    from msgspec import to_builtins

    from ckptd.client.jobs import list_jobs, set_job

    if action is None or job is None:
        if action is not None:
            raise UsageError(f"{action} takes a job: {', '.join(JOB_NAMES)}", next="ckptd jobs")
        found = on_cluster(list_jobs)
        session().emit(to_builtins(found), lambda: _text(found))
        return 0
    name = job
    found = on_cluster(lambda cluster: set_job(cluster, name, paused=action == "pause"))
    session().emit(to_builtins(found), lambda: _text(found))
    return NotEnoughNodes.exit_code if found.unanswered else 0


def _text(found: JobList) -> str:
    lines = [
        table(
            ("JOB", "NODE", "STATE", "DONE", "TOTAL"),
            [
                (
                    row.name,
                    row.node,
                    row.state,
                    size(row.done_bytes) if row.total_bytes else "-",
                    size(row.total_bytes) if row.total_bytes else "-",
                )
                for row in found.jobs
            ],
            right=(3, 4),
        )
    ]
    lines += [
        f"{row.name} on {row.node}: {printable(row.last_error)}"
        for row in found.jobs
        if row.last_error
    ]
    if found.unanswered:
        lines += [
            f"{node} did not answer: {printable(reason)}"
            for node, reason in found.unanswered.items()
        ]
        lines.append("Find out more: ckptd nodes")
    return "\n".join(lines)
