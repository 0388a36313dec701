"""A plugin for pytest, `-p bench.gpu.failures`: each failure is told when it happens, not once all tests have run."""

from __future__ import annotations

import pytest

LINES = 30  # of a failure, its last


class Failures:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if not report.failed or terminal is None:  # xdist's workers have no terminal
            return
        terminal.write_line("")  # ends the line of dots
        terminal.write_line(f"FAILED {report.nodeid}, {report.when}")
        for line in report.longreprtext.splitlines()[-LINES:]:
            terminal.write_line(f"    {line}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Failures(config), "failures as they come")
