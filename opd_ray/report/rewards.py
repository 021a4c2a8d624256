"""What is known of the rewards that scored a run: how they proved themselves, and what they failed on."""

from html import escape

from opd_ray.report.run_folder import RunFolder, mapping, numbers

__all__ = ["rewards"]


def rewards(run: RunFolder) -> str:
    """A row a reward, and every remark about them; empty where nothing was scored."""
    evaluation = mapping(run.result.get("evaluation"))
    proofs = mapping(evaluation.get("rewards")) or mapping(run.facts.get("rewards"))
    failed = {name: sum(one.failed.get(name, 0) for one in run.rounds) for name in proofs}
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_told(str(proof)))}</td><td>{failed[name]:.0f}</td></tr>"
        for name, proof in proofs.items()
    )
    if not rows:
        return ""
    table = (
        '<div class="scroll"><table><thead><tr><th>reward</th><th>before it counted</th>'
        f"<th>pictures of rounds set aside</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    lost = numbers(evaluation.get("failed"))
    remarks = [f"{count:.0f} scores of {model} are left out of the means: they failed" for model, count in lost.items()]
    remarks += [str(remark) for remark in evaluation.get("remarks") or ()]
    remarks += [remark for one in run.rounds for remark in one.remarks]
    return table + "".join(f'<p class="missing">{escape(remark)}</p>' for remark in dict.fromkeys(remarks))


def _told(proof: str) -> str:
    return "answers with numbers; it ranks nothing (probe: finite)" if proof == "finite" else proof
