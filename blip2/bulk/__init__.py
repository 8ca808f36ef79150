"""Caption, embed or score many pictures: on one machine, or on a cluster of Ray, by the same command.

    settings.py           what is wanted
    units.py              the source, cut into numbered units of work
    unit.py               a unit, a row, a sample
    rows.py, tables.py    the rows of a unit: pictures and texts of folders and tars; of parquet and data sets
    tasks.py              what the models make of a batch
    results.py            where it goes: texts beside pictures, JSONL, parquet, tar shards
    work.py, worker.py    one unit from its source to its result; what an actor does
    run.py                all units: what is done already, what is left, progress, figures
    preview.py            a little of it, tried
    cluster.py            actors on Ray
    store.py, tars.py     files, local or remote; tar shards

A unit's result is written under a temporary name and renamed, then its report; a unit with a report is done.
So a run that was killed goes on where it was, and what comes out does not depend on how often it stopped.
"""
