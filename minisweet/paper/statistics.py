"""Means with their spread: Student's t, over seeds or over tasks."""

import numpy as np

# The 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation and half of the 95% confidence interval (Student's t): (S, ...) to (...) each.

    They are NaN where one of the S values is. Of two values there is no interval: its half would be nine deviations. Of
    one there is no deviation, and of none all three are empty.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    unknown = np.full(values.shape[1:], np.nan)
    deviation = values.std(0, ddof=1) if S > 1 else unknown
    return values.mean(0), deviation, deviation * STUDENT_T[min(S, 31) - 2] / np.sqrt(S) if S > 2 else unknown
