"""The lab: what each flag does, measured."""
