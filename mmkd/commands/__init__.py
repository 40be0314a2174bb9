"""The work of single commands: plan, bench, cache, data check, data pairs, doctor, init."""
