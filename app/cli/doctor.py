"""`sluice doctor`: what Sluice needs, what of it is missing, and what to do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from app.cli.access import client_settings
from app.cli.options import AsJson
from app.cli.terminal import out
from app.settings import ConfigError


def doctor(as_json: AsJson = False) -> None:
    """Check what Sluice needs and say what to do; ends with 1 when something fails."""
    from app.doctor import examine, examine_installation, render, settings_refused

    findings = examine_installation()
    try:
        findings += examine(client_settings())
    except ConfigError as error:
        findings.append(settings_refused(error))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        out.print(render(findings))
    if any(finding.level == "fail" for finding in findings):
        sys.exit(1)
