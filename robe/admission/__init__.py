"""Admission: which ids have an embedding of their own, the counts behind it, and the choice before training."""

from robe.admission.choice import expected_gain
from robe.admission.counter import IdCounter
from robe.admission.filter import Admission
from robe.sketches import SHARED_ID, admits

__all__ = ["SHARED_ID", "Admission", "IdCounter", "admits", "expected_gain"]
