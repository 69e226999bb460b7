// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Jobs} from "../src/Jobs.sol";
import {Vault} from "../src/Vault.sol";
import {Workers} from "../src/Workers.sol";
import {IJobs} from "../src/interfaces/IJobs.sol";
import {IWorkers} from "../src/interfaces/IWorkers.sol";
import {Court} from "./Court.sol";
import {Lite} from "./Lite.sol";

/// @dev Attacks eight places for jobs and the stake behind them: any action in any order and at any time, wrong keys, amounts past
/// the edge. Three times out of four it picks a job in the state that the action needs, or it would seldom get anywhere; an ended
/// job makes room for a new one. It is the owner of the worker, and it may act as the module that disputes and slashes.
contract JobsHandler is Lite {
    uint256 private constant CLIENT = 0xC11E;
    uint256 private constant WORKER = 0x30C;
    Jobs private immutable jobs;
    Workers private immutable workers;
    address private immutable token;
    address private immutable module;
    address private immutable guardian;
    IJobs.Quote[] private _quotes;
    uint256 private _salt;
    uint256 public slashes;
    uint256 public opened;
    uint256 public ended;
    /// @dev Something went through that the rules forbid.
    bool public broken;

    constructor(Jobs jobs_, Workers workers_, address token_, address module_, IJobs.Quote memory first) {
        (jobs, workers, token, module, guardian) = (jobs_, workers_, token_, module_, msg.sender);
        for (uint256 i = 0; i < 8; ++i) {
            _quotes.push(first);
            _renew(i);
        }
    }

    function enter(Vault vault) external {
        require(msg.sender == guardian, "setUp only");
        bytes32 consent = workers.hotKeyDigest(address(this), vm.addr(WORKER), address(0x9999), 0, type(uint40).max);
        workers.register(vm.addr(WORKER), address(0x9999), type(uint40).max, signed(WORKER, consent));
        workers.stake(token, uint128(vault.balanceOf(token, address(this))));
        workers.setExposure(token, 5_000);
    }

    function all() external view returns (IJobs.Quote[] memory) {
        return _quotes;
    }

    function open(uint256 pick, uint256 flaw) external {
        uint256 place = pick % 8;
        if (flaw % 7 != 0 && _state(place) >= IJobs.State.Settled) _renew(place);
        if (flaw % 7 > 1 && block.timestamp >= _quotes[place].deadline && _state(place) == IJobs.State.None) _renew(place);
        IJobs.Quote memory quote = _quotes[place];
        bytes32 id = jobs.jobIdOf(quote);
        bool unused = _state(place) == IJobs.State.None;
        bytes memory word = signed(flaw % 5 == 0 ? CLIENT : WORKER, id);
        jobs.open(quote, word, signed(flaw % 5 == 1 ? WORKER : CLIENT, jobs.orderDigest(id)));
        if (flaw % 5 < 2 || !unused) broken = true; // I3, I4
        ++opened;
    }

    function submit(uint256 pick, uint128 claimed, uint256 flaw) external {
        IJobs.Quote memory quote = _pick(pick, IJobs.State.Open);
        bytes32 id = jobs.jobIdOf(quote);
        claimed = uint128(within(claimed, 0, uint256(quote.amount) + 1));
        bytes memory word = signed(flaw % 4 == 0 ? CLIENT : WORKER, jobs.submissionDigest(id, "result", claimed));
        jobs.submit(quote, "result", claimed, word);
        if (flaw % 4 == 0 || claimed > quote.amount || block.timestamp >= quote.deadline) broken = true; // I4, I5
    }

    function settle(uint256 pick, uint128 paid, uint256 flaw) external {
        IJobs.Quote memory quote = _pick(pick, flaw % 3 == 0 ? IJobs.State.Open : IJobs.State.Submitted);
        bytes32 id = jobs.jobIdOf(quote);
        IJobs.Job memory job = jobs.job(id);
        paid = uint128(within(paid, job.state == IJobs.State.Open ? quote.amount - 1 : 0, uint256(quote.amount) + 1));
        bytes32 result = flaw % 4 == 1 ? bytes32("another") : bytes32("result");
        bytes memory word = signed(flaw % 4 == 0 ? WORKER : CLIENT, jobs.acceptanceDigest(id, result, paid));
        jobs.settle(quote, result, paid, word);
        ++ended;
        if (flaw % 4 == 0 || paid < job.claimed || paid > quote.amount) broken = true; // I4
        if (job.state == IJobs.State.Submitted ? flaw % 4 == 1 : paid < quote.amount) broken = true;
    }

    function finalize(uint256 pick, uint256 waited) external {
        IJobs.Quote memory quote = _pick(pick, IJobs.State.Submitted);
        uint40 end = jobs.job(jobs.jobIdOf(quote)).windowEnd;
        _wait(waited, end);
        jobs.finalize(quote);
        ++ended;
        if (end == 0 || block.timestamp < end) broken = true; // I5
    }

    function refund(uint256 pick, uint256 waited) external {
        IJobs.Quote memory quote = _pick(pick, IJobs.State.Open);
        _wait(waited, quote.deadline);
        jobs.refund(quote);
        ++ended;
        if (block.timestamp < quote.deadline) broken = true; // I5
    }

    function fail(uint256 pick, uint256 flaw) external {
        IJobs.Quote memory quote = _pick(pick, flaw % 2 == 0 ? IJobs.State.Open : IJobs.State.Submitted);
        bool late = jobs.job(jobs.jobIdOf(quote)).state == IJobs.State.Open && block.timestamp >= quote.deadline;
        if (flaw % 3 == 0) vm.prank(quote.client);
        jobs.fail(quote);
        ++ended;
        if (flaw % 3 == 0 || late) broken = true;
    }

    function dispute(uint256 pick) external {
        IJobs.Quote memory quote = _pick(pick, IJobs.State.Submitted);
        uint40 end = jobs.job(jobs.jobIdOf(quote)).windowEnd;
        vm.prank(module);
        jobs.dispute(quote);
        if (block.timestamp >= end) broken = true;
    }

    function resolve(uint256 pick, uint128 toWorker, bool penalize) external {
        IJobs.Quote memory quote = _pick(pick, IJobs.State.Disputed);
        uint128 claimed = jobs.job(jobs.jobIdOf(quote)).claimed;
        toWorker = uint128(within(toWorker, 0, uint256(claimed) + 1));
        vm.prank(module);
        jobs.resolve(quote, toWorker, penalize);
        ++ended;
        if (toWorker > claimed) broken = true;
    }

    function stake(uint128 amount) external {
        workers.stake(token, uint128(within(amount, 1, 2_000)));
    }

    function unstake(uint128 amount) external {
        workers.unstake(token, uint128(within(amount, 1, 2_000)));
    }

    function withdrawStake(uint256 waited) external {
        IWorkers.Stake memory before = workers.stakeOf(address(this), token);
        _wait(waited, before.freeAt);
        uint256 kept = workers.lockedStake(address(this), token);
        uint128 out = workers.withdrawStake(token);
        if (block.timestamp < before.freeAt || before.active + before.unbonding - out < kept) broken = true; // I8
    }

    function earn(uint256 earned) external {
        vm.prank(module);
        workers.lockForEarnings(vm.addr(WORKER), token, earned % 4_000);
    }

    function slash(uint128 amount) external {
        IWorkers.Stake memory before = workers.stakeOf(address(this), token);
        amount = amount % 16 == 0 ? amount : amount % 100;
        vm.prank(module);
        (uint256 slashId, uint128 booked) =
            workers.bookSlash(vm.addr(WORKER), token, amount, address(0xD1), address(0xD2), 0);
        if (booked > amount || booked > (before.active + before.unbonding) / 2) broken = true; // I7
        if (slashId > slashes) slashes = slashId;
    }

    function move(uint256 pick, uint256 waited) external {
        uint256 slashId = within(pick, 1, slashes + 1);
        uint256 movesAt = workers.slash(slashId).movesAt;
        _wait(waited, movesAt);
        workers.moveSlash(slashId);
        if (movesAt == 0 || block.timestamp < movesAt) broken = true;
    }

    function cancel(uint256 pick, uint256 flaw) external {
        uint256 slashId = within(pick, 1, slashes + 1);
        uint256 movesAt = workers.slash(slashId).movesAt;
        if (flaw % 2 == 0) vm.prank(guardian);
        workers.cancelSlash(slashId);
        if (flaw % 2 == 1 || block.timestamp >= movesAt) broken = true;
    }

    /// @dev A little, or to the second before or of `goal`.
    function _wait(uint256 waited, uint256 goal) private {
        if (waited % 8 < 4 || goal <= block.timestamp + 1) vm.warp(block.timestamp + waited % 20 minutes);
        else vm.warp(waited % 8 == 4 ? goal - 1 : goal);
    }

    function _state(uint256 place) private view returns (IJobs.State) {
        return jobs.job(jobs.jobIdOf(_quotes[place])).state;
    }

    function _pick(uint256 pick, IJobs.State wanted) private view returns (IJobs.Quote memory) {
        if (pick % 4 != 0) {
            for (uint256 i = 0; i < 8; ++i) {
                if (_state((pick / 4 + i) % 8) == wanted) return _quotes[(pick / 4 + i) % 8];
            }
        }
        return _quotes[pick / 4 % 8];
    }

    function _renew(uint256 place) private {
        IJobs.Quote storage quote = _quotes[place];
        quote.salt = bytes32(++_salt);
        quote.amount = uint128(100 + place);
        quote.penalty = uint128(place * 100);
        quote.deadline = uint40(block.timestamp + (place + 1) * 3 hours);
    }
}

contract JobsInvariants is Court {
    JobsHandler private handler;
    uint256 private constant STAKE = 20_000;

    function setUp() public override {
        super.setUp();
        IJobs.Quote memory first = quoteOf(1, address(0), 0);
        first.worker = vm.addr(0x30C);
        handler = new JobsHandler(jobs, workers, address(token), address(disputes), first);
        fund(address(handler), STAKE);
        handler.enter(vault);
        target(address(handler));
    }

    /// @dev I1: what Jobs has locked is what its jobs that have not ended hold; so it is with the penalties.
    function invariant_everyLockHasItsJob() public view {
        (uint256 amounts, uint256 penalties) = (0, 0);
        IJobs.Quote[] memory quotes = handler.all();
        for (uint256 i = 0; i < quotes.length; ++i) {
            IJobs.State state = jobs.job(jobs.jobIdOf(quotes[i])).state;
            if (state == IJobs.State.Open || state == IJobs.State.Submitted || state == IJobs.State.Disputed) {
                amounts += quotes[i].amount;
                penalties += quotes[i].penalty;
            }
        }
        same(locked(address(jobs)), amounts, "locks of jobs");
        same(workers.stakeOf(address(handler), address(token)).held, penalties, "held");
    }

    /// @dev I1, I7: what Workers has locked is stake and booked slashes, whoever they belong to.
    function invariant_everyStakeIsThere() public view {
        IWorkers.Stake memory mine = workers.stakeOf(address(handler), address(token));
        uint256 sum = uint256(mine.active) + mine.unbonding;
        mine = workers.stakeOf(address(this), address(token));
        sum += uint256(mine.active) + mine.unbonding;
        for (uint256 i = 1;; ++i) {
            IWorkers.Slash memory found = workers.slash(i);
            if (found.state == IWorkers.SlashState.None) break;
            if (found.state == IWorkers.SlashState.Booked) sum += found.amount;
        }
        same(locked(address(workers)), sum, "locks of workers");
    }

    /// @dev I1, I6: nothing is made and nothing is lost.
    function invariant_theMoneyIsWhole() public view {
        uint256 free = balance(vm.addr(CLIENT)) + balance(address(this)) + balance(address(handler));
        free += balance(address(0x9999)) + balance(address(0xD1)) + balance(address(0xD2)) + balance(workers.BURN());
        uint256 owed = vault.liabilities(address(token));
        same(free + locked(address(jobs)) + locked(address(workers)), owed, "liabilities");
        require(token.balanceOf(address(vault)) >= owed, "coins");
    }

    /// @dev I3, I4, I5, I7, I8: see where the handler sets it.
    function invariant_noRuleWasBroken() public view {
        require(!handler.broken(), "broken");
        require(handler.ended() <= handler.opened(), "I3: a job ended twice");
    }
}
