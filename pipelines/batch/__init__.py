"""Many videos from rows of a file: named by what decides their pixels, so that a run ended at any moment goes on."""
