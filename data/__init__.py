"""Preference data: made (`generate`), judged (`judge`), read (`preferences`); models checked (`models`)."""
