"""Preference data: made (`generate`), judged (`judge`), read (`preferences`); `models` checks."""
