from mmkd.cli import entry

entry()
