"""What stands between a user and a good run: the environment and the data, checked before hours are
spent.

Every check adds findings: errors keep training from starting, warnings deserve a look, notes say
what was seen.
"""

from camoxpert.doctor.dataset import Examination, examine_data, write_clean_list
from camoxpert.doctor.environment import check_environment
from camoxpert.doctor.finding import Finding

__all__ = ["Examination", "Finding", "check_environment", "examine_data", "write_clean_list"]
