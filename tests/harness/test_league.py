"""The league's tables say what the records hold, and a dash where they hold nothing."""

from rlbook.harness.league import code_lines, league_row, league_table, traffic_table
from rlbook.harness.records import record


def test_the_table_has_a_line_for_each_record_fastest_first():
    kept = {name: record(f"league-{name}") for name in ("dqn", "ppo")}
    rows = [league_row(name, one) for name, one in kept.items()]
    lines = league_table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ppo", "| dqn"]
    assert f"| {code_lines('ppo')} |" in lines[2]
    assert f"{kept['ppo'].median('env_steps'):,.0f}" in lines[2]


def test_traffic_shows_what_is_known_and_leaves_out_who_has_none():
    kept = {name: record(f"league-{name}") for name in ("ppo", "dqn", "impala")}
    lines = traffic_table(kept).splitlines()
    assert len(lines) == 4, "PPO in one process sends nothing, waits for nobody, replays nothing"
    dqn, impala = (line.strip("| ").split(" | ") for line in lines[2:])
    assert dqn == ["dqn", "–", "–", f"{kept['dqn'].median('replay_ratio'):.1f}", "–", "–"]
    assert impala[1] == f"{kept['impala'].median('policy_lag_mean'):.1f}"
    assert impala[4] == f"{kept['impala'].median('learner_idle_fraction'):.0%}"
