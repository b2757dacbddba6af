"""Preference data: made (`generate`), judged (`judge`) and read from anywhere (`preferences`)."""
