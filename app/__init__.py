"""The command line: each verb one call into a public entry of the rest."""
