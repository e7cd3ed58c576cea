"""Forecasts of what the next minute needs; `Levels` is the entry."""

from templated.scaling.forecast.levels import Levels

__all__ = ["Levels"]
