from sd_unlearn.api import attack as attack
from sd_unlearn.api import calibrate as calibrate
from sd_unlearn.api import evaluate as evaluate
from sd_unlearn.api import export as export
from sd_unlearn.api import fuse as fuse
from sd_unlearn.api import render as render
from sd_unlearn.api import report as report
from sd_unlearn.api import train as train
from sd_unlearn.data.concept import Concept as Concept
from sd_unlearn.data.concept import Evaluation as Evaluation
from sd_unlearn.data.concept import Images as Images
from sd_unlearn.data.find_concept import load_concept as load_concept
from sd_unlearn.errors import ConditionError as ConditionError
from sd_unlearn.errors import UnlearnError as UnlearnError
from sd_unlearn.errors import UsageError as UsageError
from sd_unlearn.results import Results as Results
from sd_unlearn.results import read_results as read_results

__version__: str
