"""`python -m launch doctor`: what is wrong with the machines, before a run finds out.

`start` starts ranks as a run would, `rank` is what they run, `checks` the list of what is looked at. `machine`,
`devices`, `disks` and `exchange` measure and judge, `meeting` is how ranks tell each other what they have found, and
`report` what a person and a program read in the end. Nothing here trains, and nothing is mended.
"""
