"""From a name to a checked folder of converted weights."""
