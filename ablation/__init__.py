"""The parts of ablate.py: study -> trials -> runner -> records -> statistics -> report and page, and submission."""
