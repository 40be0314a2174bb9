"""The work of single commands: plan, bench, cache, data check, answers and pairs, doctor, init."""
