"""
The last lines of a report on any of the tests: which were skipped and why; then N passed, N failed,
N skipped.
"""

import signal

# a job in the background ignores Ctrl-C, and so would the programs under test
signal.signal(signal.SIGINT, signal.default_int_handler)

outcomes, skips = {}, []


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not for `make check`")
    config.addinivalue_line("markers",
                            "xdist_group: what one of pytest-xdist's workers does alone, "
                            "since the tests share something that takes long to make")


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker is left with it alone at the end."""
    items.sort(key=lambda item: "test_sanitized" not in item.nodeid)


def note(report, outcome):
    if report.skipped:
        reason = str(getattr(report, "wasxfail", ""))
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        skips.append(f"skipped {report.nodeid}: {reason}")
        outcome = "skipped"
    elif report.failed:
        outcome = "failed"
    if outcomes.get(report.nodeid) != "failed":  # a test may pass and its cleaning up fail
        outcomes[report.nodeid] = outcome


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        note(report, "passed")


def pytest_collectreport(report):
    if not report.passed:
        note(report, "failed")


def pytest_unconfigure(config):
    if hasattr(config, "workerinput"):
        return  # one of pytest-xdist's workers: the process that started it reports
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    if counts["skipped"]:
        line += f", {counts['skipped']} skipped"
    out = config.get_terminal_writer()
    for skip in skips:
        out.line(skip)
    out.line(line)
    out.flush()
