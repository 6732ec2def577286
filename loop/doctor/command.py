"""`python -m loop doctor`: checks a run and forecasts steps, memory, disk and time.

It takes the flags of training; without flags it checks the main job. It needs no GPU and no
weights, and reports all errors at once. --estimate prints only the memory, from a config.json.
"""

from collections.abc import Sequence

from data.errors import UserError, add_errors
from loop.config.load import read_config
from loop.config.preflight import conflicts, outdated, together, version_rows
from loop.doctor.flags import DoctorConfig
from loop.monitor.formatting import GREEN, Page, in_colour


def main(argv: Sequence[str]) -> None:
    """Print the report; raises UserError with all errors."""
    errors: list[str] = []
    config = read_config(argv, DoctorConfig, __doc__ or "", errors)
    if config.estimate:
        from loop.doctor.memory.table import print_estimate

        add_errors(errors, None)
        print_estimate(config)
        return
    page = Page(in_colour())
    page.section("versions", version_rows())
    add_errors([*outdated(), *conflicts()], errors)
    try:
        from loop.doctor.examine import examine  # not at the top: its packages may conflict
    except ImportError as error:
        reason = " ".join(str(error).split())
        errors.append(f"the packages cannot be imported, so no other check ran: {reason}")
    else:
        add_errors(examine(argv, config, page), errors)
    if errors:
        raise UserError(together(errors))
    print(f"\n{page.marked('ready', GREEN)}")
