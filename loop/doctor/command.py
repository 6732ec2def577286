"""`python -m loop doctor`: all that can be known of a run before it costs anything.

The same flags as training, and none of them: the main job. It needs no GPU and no weights, and
tells every mistake at once. --estimate tells memory alone, from a config.json.
"""

from collections.abc import Sequence

from data.errors import UserError, add_errors
from loop.config.load import read_config
from loop.config.preflight import conflicts, outdated, together, version_rows
from loop.doctor.flags import DoctorConfig
from loop.monitor.formatting import GREEN, Page, in_colour


def main(argv: Sequence[str]) -> None:
    """Print the report; raises UserError with all that is wrong."""
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
        from loop.doctor.examine import examine  # here: it imports what may not go together
    except ImportError as error:
        reason = " ".join(str(error).split())
        errors.append(f"the packages cannot be imported, so nothing more is known: {reason}")
    else:
        add_errors(examine(argv, config, page), errors)
    if errors:
        raise UserError(together(errors))
    print(f"\n{page.marked('ready', GREEN)}")
