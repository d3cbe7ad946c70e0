"""The page of several students."""

from pcdistill.report import write_students_report
from tests.report.runs import make_comparison, make_result, page_of, stopped


def grown(results, name, parameters, shift):
    found = []
    for result in results:
        result = {**result, "student": {"name": name, "parameters": parameters, "macs": 10 * parameters}}
        for epoch in ("best", "last"):
            if result[epoch]:
                values = {**result[epoch]["test"], "top1": result[epoch]["test"]["top1"] + shift}
                result[epoch] = {**result[epoch], "test": values}
        found.append(result)
    return found


def test_students_are_weighed_against_their_cost(tmp_path):
    base = make_comparison()
    results = {"cifar/a": grown(base, "cifar/a", 80_000, 0.0), "cifar/b": grown(base, "cifar/b", 300_000, 2.0)}
    page = page_of(write_students_report(tmp_path, results, "pcdistill compare --students cifar/a,cifar/b"))
    assert "The highest mean is cifar/b's with pcd: 93.20 % top-1, 300 k parameters." in page.text.replace("\xa0", " ")
    assert "Of the smaller ones cifar/a with pcd is highest: 91.20 %, 2.00 points less" in page.text
    assert "cifar/b: pcd against kd" in page.text
    assert page.tags.count("svg") == 2  # against parameters, and against MACs
    assert "teacher" in page.text


def test_one_seed_and_nothing_finished_have_pages(tmp_path):
    one = {
        name: [make_result("kd", 0, student={"name": name, "parameters": n})] for name, n in (("a", 1000), ("b", 9000))
    }
    page = page_of(write_students_report(tmp_path / "one", one, ""))
    assert "one seed each" in page.text
    assert page.tags.count("svg") == 2
    gone = [{**stopped("kd"), "teacher": None}]
    none = page_of(write_students_report(tmp_path / "none", {"a": gone, "b": gone}, ""))
    assert "svg" not in none.tags
    assert "gave no value" in none.text
