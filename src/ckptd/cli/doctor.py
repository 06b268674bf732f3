"""`ckptd doctor`: what is wrong, and what to type next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptd.cli.session import session, shared_options
from ckptd.cli.tables import printable
from ckptd.errors import ConfigError

if TYPE_CHECKING:
    from ckptd.client.findings import Finding


@click.command("doctor")
@shared_options
def doctor_command() -> int:
    """Look for what is wrong on this machine and in the cluster.

    Config, certificate, key, cipher, peers, control and bulk ports, clocks, disks, documents,
    versions, room: each finding comes with the exact command to type next.

    Exit 1 when something is wrong; a mere warning is exit 0.
    """
    from msgspec import to_builtins

    from ckptd.client.diagnosis import diagnose
    from ckptd.client.findings import Finding

    try:
        config = session().config()
    except ConfigError as error:
        findings = [Finding("config", "error", error.message, error.next)]
    else:
        findings = session().run(diagnose(config))
    ok = all(finding.state != "error" for finding in findings)
    session().emit({"ok": ok, "findings": to_builtins(findings)}, lambda: _text(findings, ok))
    return 0 if ok else 1


def _text(findings: list[Finding], ok: bool) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.check:12}{printable(finding.message)}")
        if finding.next:
            lines.append(f"{'':20}next: {printable(finding.next)}")
    lines.append("Nothing is wrong." if ok else "Something is wrong: see the errors above.")
    return "\n".join(lines)
