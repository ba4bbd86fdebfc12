"""Pages for people, made from `report.json` alone."""
